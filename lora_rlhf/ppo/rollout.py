"""Rollouts: answers sampled from the full distribution, and where each of them ends."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.packing import batches_by_length, left_padded
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.config import PpoSettings
from lora_rlhf.ppo.rollout_cache import rollout_cache


@dataclass
class Rollout:
    """A batch of answers. Prompts are padded on the left to Q tokens, answers on the right to R tokens.

    Attributes:
        query_ids: [batch, Q].
        query_mask: [batch, Q].
        response_ids: [batch, R] sampled tokens, pad after the end.
        action_mask: [batch, R] the tokens that were chosen up to the end: the EOS or stop string itself is one of them.
        score_ids: [batch, R] what the reward model reads: an answer that ended at a stop string has EOS in its place.
        score_mask: [batch, R].
        ended: [batch] whether the answer ended by itself.
        sampled_logprobs: [batch, R] of the sampler, in nats at the sampling temperature.
        texts: the answers without EOS and stop string.
    """

    query_ids: torch.Tensor
    query_mask: torch.Tensor
    response_ids: torch.Tensor
    action_mask: torch.Tensor
    score_ids: torch.Tensor
    score_mask: torch.Tensor
    ended: torch.Tensor
    sampled_logprobs: torch.Tensor
    texts: list[str]

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
        """Prompt and answer as the reward model reads them [batch, Q + R]."""
        return torch.cat([self.query_ids, self.score_ids], 1)

    @property
    def text_mask(self) -> torch.Tensor:
        """Real tokens of `text_ids`."""
        return torch.cat([self.query_mask, self.score_mask], 1)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; the distribution is never cut (no top-k, no top-p)."""

    response_length: int
    temperature: float
    stop_strings: tuple[str, ...] = ()
    expand_weights: bool | None = None
    """Decode from a temporary 16-bit copy; none: where memory has room."""
    batch_size: int | None = None
    """Answers decoded together; none: all."""

    @classmethod
    def of(cls, settings: PpoSettings) -> Sampling:
        """Return the sampling that the PPO settings describe."""
        stops = tuple(settings.stop_strings)
        batch = settings.rollout_batch_size
        return cls(settings.response_length, settings.temperature, stops, settings.expand_weights, batch)


def sampled_answers(
    base: SharedBase,
    role: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Any,
    generator: torch.Generator,
) -> Rollout:
    """Return one answer of `role` to each prompt (token ids that end where the answer begins).

    Each prompt draws its own random numbers up front, so that its answer does not depend on when others end.
    """
    expand = base.layers.expands(sampling.expand_weights)
    with base.expanded(role) if expand else base.role(role):
        return model_answers(
            base.trunk,
            base.lm_head,
            prompts,
            sampling,
            tokenizer,
            generator,
            autocast=None if expand else base.autocast(),
        )


@torch.no_grad()
def model_answers(
    trunk: Any,
    lm_head: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Any,
    generator: torch.Generator,
    autocast: torch.autocast | None = None,
) -> Rollout:
    """Return one answer to each prompt from any causal language model, given as trunk and LM head."""
    device = lm_head.weight.device
    query_ids, query_mask = left_padded(prompts, tokenizer.pad_token_id, device)
    rows, length = len(prompts), sampling.response_length
    uniform = torch.rand((length, rows), generator=generator, device=generator.device).to(device)
    response = torch.full((rows, length), tokenizer.pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros((rows, length), dtype=torch.float32, device=device)
    everyone = torch.arange(rows, device=device)
    with autocast or contextlib.nullcontext():
        batch = sampling.batch_size or rows
        for part in [everyone] if batch >= rows else batches_by_length(query_mask, everyone, batch):
            _decode(trunk, lm_head, query_ids, query_mask, part, uniform, sampling, tokenizer, response, logprobs)
    ends = ending_ids(tokenizer).to(device)
    return _cut_rollout(query_ids, query_mask, response, logprobs, ends, sampling.stop_strings, tokenizer)


def _decode(
    trunk: Any,
    lm_head: Any,
    query_ids: torch.Tensor,
    query_mask: torch.Tensor,
    live: torch.Tensor,
    uniform: torch.Tensor,
    sampling: Sampling,
    tokenizer: Any,
    response: torch.Tensor,
    logprobs: torch.Tensor,
) -> None:
    """Fill the rows `live` of `response` and `logprobs`; a row that has ended leaves the batch."""
    width = int(query_mask[live].sum(1).max())  # no more padding than these rows need
    ids, mask = query_ids[live, -width:], query_mask[live, -width:]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ends = ending_ids(tokenizer).to(ids.device)
    done = torch.zeros(len(query_ids), dtype=torch.bool, device=ids.device)
    cache = rollout_cache(trunk.config, width + sampling.response_length)
    for step in range(sampling.response_length):
        states = trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        probs = torch.softmax((states.to(lm_head.weight.dtype) @ lm_head.weight.T).float() / sampling.temperature, -1)
        token = inverse_cdf(probs, uniform[step, live])
        response[live, step] = token
        logprobs[live, step] = probs.gather(1, token[:, None])[:, 0].clamp(min=1e-38).log()
        done[live] |= torch.isin(token, ends)
        if sampling.stop_strings:
            for i in live[~done[live]].tolist():
                text = response[i, : step + 1].tolist()
                done[i] = _stop_position(tokenizer, text, sampling.stop_strings) is not None
        still = ~done[live]
        if not bool(still.any()):
            return
        ids, mask = token[:, None], torch.nn.functional.pad(mask, (0, 1), value=True)
        positions = positions[:, -1:] + 1
        if still.sum() <= 0.75 * len(live):  # copying the cache has a price: wait until a quarter has ended
            keep = torch.nonzero(still)[:, 0]
            cache.batch_select_indices(keep)
            ids, mask, positions, live = ids[keep], mask[keep], positions[keep], live[keep]


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return a sample per row of `probs` [rows, n], given a uniform number in [0, 1) per row."""
    cumulative = probs.cumsum(-1)
    aim = (uniform[:, None] * cumulative[:, -1:]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.searchsorted(cumulative, aim).clamp(max=probs.shape[1] - 1)[:, 0]


def ending_ids(tokenizer: Any) -> torch.Tensor:
    """Return the ids that end an answer, int64 [n]."""
    return torch.tensor([tokenizer.eos_token_id])


def _cut_rollout(
    query_ids: torch.Tensor,
    query_mask: torch.Tensor,
    response: torch.Tensor,
    logprobs: torch.Tensor,
    ends: torch.Tensor,
    stop_strings: tuple[str, ...],
    tokenizer: Any,
) -> Rollout:
    """Return the rollout with every answer cut at its first EOS or stop string; what came after is masked."""
    rows, length = response.shape
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lengths, ended = torch.full((rows,), length), torch.zeros(rows, dtype=torch.bool)
    score_lengths, texts, score_ids = lengths.clone(), [], torch.full_like(response, pad)
    endings = set(ends.tolist())
    for i, row in enumerate(response.tolist()):
        end = next((t for t, token in enumerate(row) if token in endings), None)
        body = row if end is None else row[:end]
        stop = _stop_position(tokenizer, body, stop_strings) if stop_strings else None
        if stop is not None:
            kept, lengths[i], text = stop
            body, ended[i] = body[:kept], True
        elif end is not None:
            lengths[i], ended[i] = end + 1, True
        read = [*body, eos] if ended[i] else body
        score_ids[i, : len(read)] = torch.tensor(read, device=response.device)
        score_lengths[i] = len(read)
        texts.append((tokenizer.decode(body, skip_special_tokens=True) if stop is None else text).strip())
    columns = torch.arange(length)
    action_mask = (columns < lengths[:, None]).to(response.device)
    score_mask = (columns < score_lengths[:, None]).to(response.device)
    response = torch.where(action_mask, response, pad)
    return Rollout(
        query_ids, query_mask, response, action_mask, score_ids, score_mask, ended.to(response.device),
        logprobs * action_mask, texts,
    )  # fmt: skip


def _stop_position(tokenizer: Any, tokens: list[int], stop_strings: tuple[str, ...]) -> tuple[int, int, str] | None:
    """Return (tokens before the stop string, tokens up to its end, text before it) of the first one, or none."""
    text = tokenizer.decode(tokens)
    found = [(text.index(stop), stop) for stop in stop_strings if stop in text]
    if not found:
        return None
    at, stop = min(found)
    kept = max((n for n in range(len(tokens) + 1) if len(tokenizer.decode(tokens[:n])) <= at), default=0)
    end = next(n for n in range(kept, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    return kept, end, text[:at]
