"""Everything that is read off a rollout before learning from it: old, reference, value and reward numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from lora_rlhf.base.packing import batches_by_length
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase, last_real
from lora_rlhf.config import PpoSettings
from lora_rlhf.data.chat import Message
from lora_rlhf.ppo.advantages import value_mask
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.reward.sources import AdapterReward, Answers, CombinedReward

Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What a role reads: ids [rows, length], mask [rows, length] and `SharedBase.common_states` of them."""


@dataclass
class Scored:
    """A scored rollout.

    Attributes:
        logprobs: [batch, R] of the policy before any update, as the trainer computes them; 0 where masked.
        reference: [batch, R] of the reference.
        entropy: [batch, R] of the policy.
        values: [batch, R + 1] of states 0..L; 0 where masked.
        score: [batch] combined reward, in standard deviations of the reference, each source's clipped.
        raw_scores: raw score of each source.
        common: [batch, Q + R, d] `SharedBase.common_states`, so that the update need not run those layers again.
    """

    logprobs: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    raw_scores: dict[str, torch.Tensor]
    common: torch.Tensor | None = None


def answers_of(rollout: Rollout, prompts: list[list[Message]], columns: dict[str, list[object]]) -> Answers:
    """Return the rollout as reward sources see it: prompt and answer up to its end, in ids (with EOS) and in text."""
    return Answers(rollout.text_ids, rollout.text_mask, prompts, rollout.texts, columns)


def with_rewards(scored: Scored, reward: CombinedReward, answers: Answers, clip: float | None) -> Scored:
    """Return `scored` with the combined reward, clipped; the run's own reward adapter need not look again."""
    score, raw_scores = reward.scores(answers, scored.raw_scores, clip)
    return replace(scored, score=score, raw_scores=raw_scores)


@torch.no_grad()
def scored_by_roles(
    base: SharedBase, rollout: Rollout, reward: CombinedReward, settings: PpoSettings, value_offset: float
) -> Scored:
    """Return the numbers of all roles for a rollout; the score is still 0, see `with_rewards`.

    With `settings.mixed_adapter_scoring` the roles go through the base together, each row under its own adapter;
    otherwise one after the other. Both give the same numbers within rounding.
    """
    own = [s for s in reward.sources if isinstance(s, AdapterReward) and s.role == REWARD]
    count, width = rollout.action_mask.shape
    logprobs, reference, entropy = torch.zeros((3, count, width), device=base.device)
    values, raw = torch.zeros((count, width + 1), device=base.device), torch.zeros(count, device=base.device)
    kept: torch.Tensor | None = None
    everyone = torch.arange(count, device=base.device)
    with base.layers.adapters_cast(POLICY, REWARD, VALUE):
        for rows in batches_by_length(rollout.mask, everyone, settings.scoring_batch_size):
            ids, mask, action = rollout.ids[rows], rollout.mask[rows], rollout.action_mask[rows]
            common, of_text = _common_states(base, rollout, rows, bool(own))
            if common is not None:
                kept = common.new_zeros((count, *common.shape[1:])) if kept is None else kept
                kept[rows] = common
            read = dict.fromkeys(_roles_of_ids(base), (ids, mask, common))
            if own:
                read[REWARD] = (rollout.text_ids[rows], rollout.text_mask[rows], of_text)
            states = _states_of_roles(base, read, settings.mixed_adapter_scoring)
            logprobs[rows], entropy[rows] = base.response_logprobs(
                states[POLICY], ids, action, settings.temperature, settings.logits_chunk_size
            )
            reference[rows], _ = base.response_logprobs(
                states[REFERENCE], ids, action, settings.temperature, settings.logits_chunk_size, with_entropy=False
            )
            values[rows] = state_values(base, states.get(VALUE, states[POLICY]), action, value_offset)
            if own:
                raw[rows] = base.head_outputs(REWARD, last_real(states[REWARD], rollout.text_mask[rows]))
    own_scores = {own[0].name: raw} if own else {}
    return Scored(logprobs, reference, entropy, values, torch.zeros_like(raw), own_scores, kept)


def _roles_of_ids(base: SharedBase) -> list[str]:
    """Return the roles that read the sampled tokens; a value head without adapter reads the policy's states."""
    return [role for role in (POLICY, REFERENCE, VALUE) if role == REFERENCE or role in base.configs]


def _common_states(
    base: SharedBase, rollout: Rollout, rows: torch.Tensor, with_text: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return `SharedBase.common_states` of the sampled tokens and, where asked for, of the text of some rows.

    Causal layers do not look ahead. So where the text begins with the sampled tokens, their states are those of the
    text; answers that are read otherwise than they were sampled (after a stop string, with a turn's end that is not
    EOS) need a pass of their own.
    """
    ids, mask = rollout.ids[rows], rollout.mask[rows]
    if not with_text:
        return base.common_states(ids, mask), None
    text_ids, text_mask = rollout.text_ids[rows], rollout.text_mask[rows]
    of_text = base.common_states(text_ids, text_mask)
    if of_text is None:
        return None, None
    width = ids.shape[1]
    of_ids = of_text[:, :width] * mask[..., None]
    differs = (mask & ~(text_mask[:, :width] & (text_ids[:, :width] == ids))).any(1)
    if differs.any() and (own := base.common_states(ids[differs], mask[differs])) is not None:
        of_ids[differs] = own
    return of_ids, of_text


def _states_of_roles(base: SharedBase, read: Mapping[str, Read], mixed: bool) -> dict[str, torch.Tensor]:
    """Return the states [rows, length, d] of each role for what it reads; a mixed pass plays all roles at once."""
    if not mixed:
        return {role: base.hidden(role, *inputs) for role, inputs in read.items()}
    width = max(ids.shape[1] for ids, _, _ in read.values())

    def together(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Concatenate [rows, length, ...] of several lengths."""
        return torch.cat([pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1])) for part in parts])

    ids, mask = (together(inputs[i] for inputs in read.values()) for i in (0, 1))  # type: ignore[misc]
    common = [states for _, _, states in read.values() if states is not None]
    roles = [role for role, (own, _, _) in read.items() for _ in own]
    states = base.hidden_mixed(roles, ids, mask, together(common) if common else None).chunk(len(read))
    return {role: part[:, : read[role][0].shape[1]] for role, part in zip(read, states, strict=True)}


def state_values(base: SharedBase, states: torch.Tensor, action_mask: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the values [batch, R + 1] of states 0..L (state t has seen t tokens of the answer), 0 where masked."""
    width = action_mask.shape[1] + 1
    return (base.head_outputs(VALUE, states[:, -width:]) + offset) * value_mask(action_mask)
