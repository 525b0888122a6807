"""Everything that is read off a rollout before learning from it: old, reference, value and reward numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lora_rlhf.base.packing import batches_by_length
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase, last_real
from lora_rlhf.config import PpoSettings
from lora_rlhf.data.chat import Message
from lora_rlhf.ppo.advantages import value_mask
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.reward.sources import AdapterReward, Answers, CombinedReward


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
    """Return the rollout as reward sources see it: prompt and truncated answer, in ids and in text."""
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
            common = base.common_states(ids, mask)
            if common is not None:
                kept = common.new_zeros((count, *common.shape[1:])) if kept is None else kept
                kept[rows] = common
            states = _states_of_roles(base, rollout, rows, common, bool(own), settings.mixed_adapter_scoring)
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


def _states_of_roles(
    base: SharedBase, rollout: Rollout, rows: torch.Tensor, common: torch.Tensor | None, with_reward: bool, mixed: bool
) -> dict[str, torch.Tensor]:
    """Return the states [rows, Q + R, d] of each role that has an adapter, and of the reference.

    The reward role, where it is asked for, reads the text. A value head without adapter reads the policy's states.
    """
    played = [role for role in (POLICY, REFERENCE, VALUE) if role == REFERENCE or role in base.configs]
    read = dict.fromkeys(played, (rollout.ids[rows], rollout.mask[rows], common))
    if with_reward:
        ids, mask = rollout.text_ids[rows], rollout.text_mask[rows]
        same = torch.equal(ids, rollout.ids[rows]) and torch.equal(mask, rollout.mask[rows])
        read[REWARD] = (ids, mask, common if same else base.common_states(ids, mask))
    if not mixed:
        return {role: base.hidden(role, *inputs) for role, inputs in read.items()}
    ids, mask = (torch.cat([inputs[i] for inputs in read.values()]) for i in (0, 1))  # type: ignore[misc]
    entering = None if common is None else torch.cat([inputs[2] for inputs in read.values()])  # type: ignore[misc]
    roles = [role for role in read for _ in rows]
    return dict(zip(read, base.hidden_mixed(roles, ids, mask, entering).chunk(len(read)), strict=True))


def state_values(base: SharedBase, states: torch.Tensor, action_mask: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the values [batch, R + 1] of states 0..L (state t has seen t tokens of the answer), 0 where masked."""
    width = action_mask.shape[1] + 1
    return (base.head_outputs(VALUE, states[:, -width:]) + offset) * value_mask(action_mask)
