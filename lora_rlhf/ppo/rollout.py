"""Rollouts: answers sampled from the full distribution, and where each of them ends."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from lora_rlhf.base.packing import batches_by_length, left_padded, right_padded
from lora_rlhf.base.positions import PIECES
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.data.chat import ending_ids
from lora_rlhf.ppo.decoding import (
    Decoder,
    Sampling,
    decoder_of,
    special_ids,
    stop_position,
    tokens_of_text,
    visible_tokens,
)


@dataclass
class Rollout:
    """A batch of answers. Prompts are padded on the left to Q tokens, answers on the right to R tokens.

    Reward training ends every answer with EOS. So the reward model reads each answer with EOS after it, however it
    ended: a missing end costs what the penalties say, and nothing else. That takes S = R + 1 tokens, and more where a
    token that straddles a stop string is read as several.

    Attributes:
        query_ids: [batch, Q].
        query_mask: [batch, Q].
        response_ids: [batch, R] sampled tokens, pad after the end.
        action_mask: [batch, R] the tokens that were chosen up to the end: the EOS or stop string itself is one of them.
        score_ids: [batch, S] what the reward model reads: the tokens of the answer without its end, then EOS.
        score_mask: [batch, S].
        ended: [batch] whether the answer ended by itself.
        ended_by_eos: [batch] whether it did so by a token (see `ending_ids`), where plain `generate` ends too.
        sampled_logprobs: [batch, R] of the sampler, in nats at the sampling temperature.
        free: [batch] whether the policy sampled the whole answer; else its first tokens were given.
        texts: the answers without EOS and stop string.
    """

    query_ids: torch.Tensor
    query_mask: torch.Tensor
    response_ids: torch.Tensor
    action_mask: torch.Tensor
    score_ids: torch.Tensor
    score_mask: torch.Tensor
    ended: torch.Tensor
    ended_by_eos: torch.Tensor
    sampled_logprobs: torch.Tensor
    free: torch.Tensor
    texts: list[str]

    def part(self, rows: slice) -> Rollout:
        """Return some rows."""
        return Rollout(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def ids(self) -> torch.Tensor:
        """Prompt and sampled tokens [batch, Q + R]."""
        return torch.cat([self.query_ids, self.response_ids], 1)

    @property
    def mask(self) -> torch.Tensor:
        """Real tokens of `ids`."""
        return torch.cat([self.query_mask, self.action_mask], 1)

    @property
    def text_ids(self) -> torch.Tensor:
        """Prompt and answer as the reward model reads them [batch, Q + S]."""
        return torch.cat([self.query_ids, self.score_ids], 1)

    @property
    def text_mask(self) -> torch.Tensor:
        """Real tokens of `text_ids`."""
        return torch.cat([self.query_mask, self.score_mask], 1)


def sampled_answers(
    base: SharedBase,
    role: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Any,
    generator: torch.Generator,
    rows: slice = slice(None),
    prefixes: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Return one answer of `role` to each prompt (token ids that end where the answer begins), or to some `rows`.

    Where there are `prefixes`, the answer to a prompt begins with its prefix, which may be empty.

    Each prompt draws its own random numbers up front, so that its answer does not depend on when others end, nor on
    which rows are answered here.
    """
    decoder = decoder_of(base.causal_lm)
    base.layers.folding = None
    expand = decoder.reads_working_copy and base.layers.expands(sampling.expand_weights)
    if expand:
        with base.layers.adapters_cast(role), base.expanded(role):
            return model_answers(decoder, prompts, sampling, tokenizer, generator, None, rows, prefixes)
    with base.role(role), base.layers.adapters_cast(role):
        return model_answers(decoder, prompts, sampling, tokenizer, generator, base.autocast(), rows, prefixes)


@torch.no_grad()
def model_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Any,
    generator: torch.Generator,
    autocast: torch.autocast | None = None,
    rows: slice = slice(None),
    prefixes: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Return one answer to each prompt, or to some `rows`, from any causal language model, given as its decoder.

    Where there are `prefixes`, the answer to a prompt begins with its prefix, which may be empty.
    """
    length = sampling.response_length
    uniform = torch.rand((length, len(prompts)), generator=generator, device=generator.device)[:, rows]
    uniform, prompts = uniform.to(decoder.device), prompts[rows]
    query_ids, query_mask = left_padded(prompts, tokenizer.pad_token_id, decoder.device)
    count = len(prompts)
    given = None if prefixes is None else _given_tokens(prefixes[rows], length, decoder.device)
    response = torch.full((count, length), tokenizer.pad_token_id, dtype=torch.long, device=decoder.device)
    logprobs = torch.zeros((count, length), dtype=torch.float32, device=decoder.device)
    everyone = torch.arange(count, device=decoder.device)
    with autocast or contextlib.nullcontext():
        batch = sampling.batch_size or count
        for part in [everyone] if batch >= count else batches_by_length(query_mask, everyone, batch):
            width = int(query_mask[part].sum(1).max())  # no more padding than these rows need
            ids, mask = query_ids[part, -width:], query_mask[part, -width:]
            own = None if given is None else given[:, part]
            response[part], logprobs[part] = decoder(ids, mask, uniform[:, part], sampling, tokenizer, own)
    free = torch.ones(count, dtype=torch.bool, device=decoder.device) if given is None else given[0] < 0
    return _cut_rollout(query_ids, query_mask, response, logprobs, free, sampling.stop_strings, tokenizer)


def _given_tokens(prefixes: Sequence[Sequence[int]], length: int, device: torch.device) -> torch.Tensor:
    """Return [length, rows] the tokens of each row's prefix, and -1 where none is given."""
    rows = [[*prefix[:length], *[-1] * (length - len(prefix))] for prefix in prefixes]
    return torch.tensor(rows, dtype=torch.long).view(len(rows), length).t().to(device)


def _cut_rollout(
    query_ids: torch.Tensor,
    query_mask: torch.Tensor,
    response: torch.Tensor,
    logprobs: torch.Tensor,
    free: torch.Tensor,
    stop_strings: tuple[str, ...],
    tokenizer: Any,
) -> Rollout:
    """Return the rollout with every answer cut at its first end token or stop string; what came after is masked."""
    rows, length = response.shape
    eos, pad, device = tokenizer.eos_token_id, tokenizer.pad_token_id, response.device
    lengths = torch.full((rows,), length)
    ended, by_eos = torch.zeros((2, rows), dtype=torch.bool)
    texts, read = [], []
    endings, hidden = set(ending_ids(tokenizer)), special_ids(tokenizer)
    most_read = length + PIECES  # the model has positions for no more
    for i, row in enumerate(response.tolist()):
        end = next((t for t, token in enumerate(row) if token in endings), None)
        body = row if end is None else row[:end]
        stop = stop_position(tokenizer, body, stop_strings)
        if stop is not None:
            lengths[i], ended[i] = stop[0], True
            body = tokens_of_text(tokenizer, body[: stop[0]], stop[1])
        elif end is not None:
            lengths[i], ended[i], by_eos[i] = end + 1, True, True
        body = visible_tokens(tokenizer, body, hidden)[:most_read]
        read.append([*body, eos])
        texts.append(tokenizer.decode(body, skip_special_tokens=True).strip())
    action_mask = (torch.arange(length) < lengths[:, None]).to(device)
    score_ids, score_mask = right_padded(read, pad, device, at_least=length + 1)
    response = torch.where(action_mask, response, pad)
    return Rollout(
        query_ids, query_mask, response, action_mask, score_ids, score_mask, ended.to(device), by_eos.to(device),
        logprobs * action_mask, free, texts,
    )  # fmt: skip
