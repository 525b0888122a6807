"""How tokens are sampled from a model: the decoders, and what ends an answer. Another engine is another `Decoder`."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.config import PpoSettings
from lora_rlhf.data.chat import answer_ids, answer_lead, ending_ids
from lora_rlhf.ppo.rollout_cache import rollout_cache

EXTRA_TOKENS = 8
"""Tokens that are looked at beyond the length of a stop string: the first ones may read otherwise than in the whole."""


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


class Decoder(Protocol):
    """What samples tokens from a model, for a batch of prompts."""

    device: torch.device
    reads_working_copy: bool
    """Whether it computes through the layers' own forward, which reads a working copy where there is one."""

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        uniform: torch.Tensor,
        sampling: Sampling,
        tokenizer: Any,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sampled tokens [rows, R] and their log-probs (nats); after the end of an answer they mean nothing.

        Args:
            ids: [rows, Q] prompts, padded on the left.
            mask: [rows, Q], true for real tokens.
            uniform: [R, rows] the numbers in [0, 1) that choose the tokens.
            sampling: length, temperature and stop strings.
            tokenizer: of the model.
            given: [R, rows] tokens that are not sampled but taken, each with the log-prob that the model gives it; -1
                where the token is sampled. None: all are sampled.
        """


def decoder_of(causal_lm: Any) -> Decoder:
    """Return the decoder of a model: unsloth's, if unsloth has loaded it, else our own."""
    if hasattr(causal_lm, "for_inference"):  # unsloth's mark
        return GenerateDecoder(causal_lm)
    return TrunkDecoder(trunk_of(causal_lm), LmHead.of(causal_lm))


class TrunkDecoder:
    """Our own loop over the transformer and the LM head; a row that has ended leaves the batch."""

    reads_working_copy = True

    def __init__(self, trunk: Any, lm_head: LmHead) -> None:
        self.trunk, self.lm_head, self.device = trunk, lm_head, lm_head.weight.device

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        uniform: torch.Tensor,
        sampling: Sampling,
        tokenizer: Any,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probs as `Decoder` says."""
        rows = len(ids)
        response = torch.full((rows, sampling.response_length), tokenizer.pad_token_id, device=self.device)
        logprobs = torch.zeros(response.shape, device=self.device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = rollout_cache(self.trunk.config, ids.shape[1] + sampling.response_length)
        live = torch.arange(rows, device=self.device)
        endings = AnswerEndings(tokenizer, sampling.stop_strings, rows)
        live_rows = list(range(rows))  # what `live` says, without asking the device
        for step in range(sampling.response_length):
            states = self.trunk(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            taken = None if given is None else given[step, live]
            token, logprobs[live, step] = chosen_tokens(
                self.lm_head(states), uniform[step, live], sampling.temperature, taken
            )
            response[live, step] = token
            unfinished = endings.unfinished(live_rows, token.tolist())  # the one wait for the device per token
            if not unfinished:
                break
            ids, mask = token[:, None], torch.nn.functional.pad(mask, (0, 1), value=True)
            positions = positions[:, -1:] + 1
            if len(unfinished) <= 0.75 * len(
                live_rows
            ):  # copying the cache has a price: wait until a quarter has ended
                live_rows = [live_rows[place] for place in unfinished]
                keep = torch.tensor(unfinished).to(self.device)
                cache.reorder_cache(keep)  # which all kinds of layers have, unlike batch_select_indices
                ids, mask, positions, live = ids[keep], mask[keep], positions[keep], live[keep]
        return response, logprobs


class AnswerEndings:
    """Watches the answers of a batch grow, and tells which of them have ended by a token or by a stop string.

    Args:
        tokenizer: of the model.
        stop_strings: that end an answer besides `ending_ids`.
        rows: of the batch.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...], rows: int) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.ending_ids = set(ending_ids(tokenizer))
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        # A token is at least one byte of text, so that a stop string is in the last tokens of the answer that it ends.
        self.last_tokens = max((len(stop.encode()) for stop in stop_strings), default=0) + EXTRA_TOKENS

    def unfinished(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Take the next token of each of `rows`; return the places in `rows` of those that have not ended."""
        for row, token in zip(rows, tokens, strict=True):
            self.tokens[row].append(token)
            self.ended[row] = self.ended[row] or token in self.ending_ids or self._has_stop_string(row)
        return [place for place, row in enumerate(rows) if not self.ended[row]]

    def _has_stop_string(self, row: int) -> bool:
        """Return whether a stop string is in the answer, looking at its last tokens first: that is quick."""
        if not self.stop_strings:
            return False
        tokens = self.tokens[row]
        text = self.tokenizer.decode(tokens[-self.last_tokens :])
        if not any(stop in text for stop in self.stop_strings):
            return False
        return stop_position(self.tokenizer, tokens, self.stop_strings) is not None


class GenerateDecoder:
    """The model's own `generate`, which unsloth makes faster (`for_inference`); the draws are ours.

    In train mode, because unsloth then goes back to training with what it had found.
    """

    reads_working_copy = False

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm, self.device = causal_lm, causal_lm.get_output_embeddings().weight.device

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        uniform: torch.Tensor,
        sampling: Sampling,
        tokenizer: Any,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probs as `Decoder` says."""
        draws = _Draws(uniform, sampling.temperature, given)
        plain = GenerationConfig(
            do_sample=False,  # the draws leave one token to choose from
            max_new_tokens=sampling.response_length,
            eos_token_id=ending_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        endings = AnswerEndings(tokenizer, sampling.stop_strings, len(ids))
        unsloth, own_config = hasattr(self.causal_lm, "for_inference"), self.causal_lm.generation_config
        self.causal_lm.train(unsloth)
        self.causal_lm.generation_config = plain  # what ours leaves open is filled in from the model's
        try:
            found = self.causal_lm.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                generation_config=plain,
                logits_processor=LogitsProcessorList([draws]),
                stopping_criteria=StoppingCriteriaList([_Ended(endings)]),
            )[:, ids.shape[1] :]
        finally:
            self.causal_lm.generation_config = own_config
            self.causal_lm.eval()
        missing = sampling.response_length - found.shape[1]
        return torch.nn.functional.pad(found, (0, missing), value=tokenizer.pad_token_id), draws.logprobs


class _Ended(StoppingCriteria):
    """Ends a row where its answer has ended; transformers' own stop strings may begin in the prompt."""

    def __init__(self, endings: AnswerEndings) -> None:
        self.endings = endings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.endings.unfinished(list(range(len(input_ids))), input_ids[:, -1].tolist())
        return torch.tensor(self.endings.ended, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Leaves of each row's logits the one token that its uniform number chooses, and keeps its log-prob."""

    def __init__(self, uniform: torch.Tensor, temperature: float, given: torch.Tensor | None) -> None:
        self.uniform, self.temperature, self.given, self.step = uniform, temperature, given, 0
        self.logprobs = torch.zeros((uniform.shape[1], uniform.shape[0]), device=uniform.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        taken = None if self.given is None else self.given[self.step]
        token, self.logprobs[:, self.step] = chosen_tokens(scores, self.uniform[self.step], self.temperature, taken)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def chosen_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token per row of `logits` [rows, vocabulary] and its log-prob, given a uniform number per row.

    Where `given` [rows] has a token (0 and up), that one is returned in place of a sample.
    """
    probs = torch.softmax(logits.float() / temperature, -1)
    token = inverse_cdf(probs, uniform)
    if given is not None:
        token = torch.where(given >= 0, given, token)
    return token, probs.gather(1, token[:, None])[:, 0].clamp(min=1e-38).log()


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return a sample per row of `probs` [rows, n], given a uniform number in [0, 1) per row."""
    cumulative = probs.cumsum(-1)
    aim = (uniform[:, None] * cumulative[:, -1:]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.searchsorted(cumulative, aim).clamp(max=probs.shape[1] - 1)[:, 0]


def stop_position(tokenizer: Any, tokens: list[int], stop_strings: Sequence[str]) -> tuple[int, str] | None:
    """Return (tokens up to the end of the stop string, text before it) of the first one; None where there is none."""
    text = tokenizer.decode(tokens) if stop_strings else ""
    found = [(text.index(stop), stop) for stop in stop_strings if stop in text]
    if not found:
        return None
    at, stop = min(found)
    end = bisect.bisect_left(range(len(tokens)), True, key=lambda n: stop in tokenizer.decode(tokens[:n]))
    return end, text[:at]


def tokens_of_text(tokenizer: Any, tokens: list[int], text: str) -> list[int]:
    """Return ids that read `text` without the blanks at its end, which the sampled `tokens` go beyond.

    A token may straddle the end of the text. So these are the tokens that lie wholly inside it, then those of the
    characters that are missing; or the ids that training would give the text, where the tokenizer does not read the
    missing characters alone as they stand (some put a space in front).
    """
    text = text.rstrip()
    counts = range(len(tokens), -1, -1)
    inside = next(tokens[:n] for n in counts if text.startswith(tokenizer.decode(tokens[:n])))
    missing = text[len(tokenizer.decode(inside)) :]
    if not missing:
        return inside
    pieced = [*inside, *tokenizer(missing, add_special_tokens=False)["input_ids"]]
    if tokenizer.decode(pieced).strip() == text.strip():
        return pieced
    whole = answer_ids(tokenizer, text.strip())[:-1]
    return whole if tokenizer.decode(whole).strip() == text.strip() else inside


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that decoding leaves out of what a user sees."""
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return added | set(tokenizer.all_special_ids)


def visible_tokens(tokenizer: Any, tokens: list[int], hidden: set[int]) -> list[int]:
    """Return the ids that read what a user sees of `tokens`: none of `hidden`, and no blanks at either end.

    In front, tokens that are nothing but blanks go, unless the template has just these there. A word that brings its
    own space is one token and stays: cut off, the tokenizer would read the rest of the answer in other pieces.
    """
    shown = [token for token in tokens if token not in hidden]
    read = tokens_of_text(tokenizer, shown, tokenizer.decode(shown))
    text = tokenizer.decode(read)
    if text == answer_lead(tokenizer) + text.lstrip():
        return read
    blank = next(n for n in range(len(read), -1, -1) if not tokenizer.decode(read[:n]).strip())
    behind = read[blank:]
    return behind if tokenizer.decode(behind).strip() == text.strip() else read  # a byte may be blank by itself only
