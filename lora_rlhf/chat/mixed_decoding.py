"""Several roles of one base that answer together, token by token, in one batch over the same 4-bit weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TopPLogitsWarper

from lora_rlhf.base.packing import left_padded
from lora_rlhf.base.role_layers import Factors, MixedRoles, RoleLinear
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.data.chat import ending_ids
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.decoding import chosen_tokens
from lora_rlhf.ppo.rollout_cache import rollout_cache


@dataclass(frozen=True)
class ChatSampling:
    """How chat answers are sampled.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: the smallest set of tokens with this probability is sampled from; 1: all.
        max_tokens: of an answer.
        seed: of the random numbers. Every arm draws the same ones, so that arms differ by their models alone.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def checked(self, most_tokens: int) -> ChatSampling:
        """Return the same settings with whole numbers as such.

        Raises:
            UserError: a value is no number or out of its range.
        """
        ranges = {"temperature": (0, 2), "top_p": (0.01, 1), "max_tokens": (1, most_tokens), "seed": (0, 2**32 - 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            whole = name in ("max_tokens", "seed")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or (whole and value != int(value)):
                what = "a whole number" if whole else "a number"
                raise UserError(f"{name} is {what} from {low} to {high}, not {value!r:.40}")
        return ChatSampling(float(self.temperature), float(self.top_p), int(self.max_tokens), int(self.seed))


class MixedDecoding:
    """One answer per role in the making; each `step` gives one more token to every answer that has not ended.

    Args:
        base: what the roles are played on.
        roles: who answers.
        prompts: token ids for each role.
        tokenizer: of the base.
        sampling: checked.
        side_by_side: adapters of these roles (and others) from the base's layers, if they are there already.

    Attributes:
        tokens: sampled token ids of each row so far; the token that ended an answer is one of them.
        ended: whether each row ended by one of `ending_ids`.
        live: rows that go on.
    """

    def __init__(
        self,
        base: SharedBase,
        roles: Sequence[str],
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        sampling: ChatSampling,
        side_by_side: Mapping[RoleLinear, Factors] | None = None,
    ) -> None:
        self.base, self.roles, self.sampling = base, list(roles), sampling
        self._adapters = base.layers.side_by_side(roles) if side_by_side is None else side_by_side
        self._playing = MixedRoles(self.roles, self._adapters)
        self.tokens: list[list[int]] = [[] for _ in roles]
        self.ended = [False] * len(roles)
        self.live = list(range(len(roles)))
        self._ids, self._mask = left_padded(prompts, tokenizer.pad_token_id, base.device)
        self._positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)
        self._cache = rollout_cache(base.trunk.config, self._ids.shape[1] + sampling.max_tokens)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._ends = set(ending_ids(tokenizer))

    @torch.no_grad()
    def step(self) -> None:
        """Sample one token for every live row; rows that end leave the batch."""
        base = self.base
        with base.mixed(self._playing), base.autocast():
            states = base.trunk(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        chosen = self._chosen(base.lm_head(states))
        for row, token in zip(self.live, chosen.tolist(), strict=True):
            self.tokens[row].append(token)
            self.ended[row] = token in self._ends
        self._ids = chosen[:, None]
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        self._positions = self._positions[:, -1:] + 1
        self.end([row for row in self.live if self.ended[row] or len(self.tokens[row]) >= self.sampling.max_tokens])

    def end(self, rows: Sequence[int]) -> None:
        """Take rows out of the batch."""
        kept = [i for i, row in enumerate(self.live) if row not in rows]
        if len(kept) == len(self.live):
            return
        self.live = [self.live[i] for i in kept]
        if kept:
            self._playing = MixedRoles([self.roles[row] for row in self.live], self._adapters)
            keep = torch.tensor(kept, device=self._ids.device)
            self._cache.reorder_cache(keep)
            self._ids, self._mask, self._positions = self._ids[keep], self._mask[keep], self._positions[keep]

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a token id for each row of `logits` [rows, vocabulary]."""
        uniform = torch.rand(1, generator=self._generator)
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.sampling.temperature
        if self.sampling.top_p < 1:
            logits = TopPLogitsWarper(self.sampling.top_p)(self._ids, logits)
        return chosen_tokens(logits, uniform.to(logits.device).expand(len(logits)), 1.0)[0]
