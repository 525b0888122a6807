"""Everything that is read off a rollout before learning from it: old, reference, value and reward numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_rlhf.base.attention import attention_for_gradients
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
        score: [batch] combined reward, in standard deviations of the reference.
        raw_scores: raw score of each source.
    """

    logprobs: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    raw_scores: dict[str, torch.Tensor]


def answers_of(rollout: Rollout, prompts: list[list[Message]], columns: dict[str, list[object]]) -> Answers:
    """Return the rollout as reward sources see it: prompt and truncated answer, in ids and in text."""
    return Answers(rollout.text_ids, rollout.text_mask, prompts, rollout.texts, columns)


@torch.no_grad()
def scored_rollout(
    base: SharedBase,
    rollout: Rollout,
    reward: CombinedReward,
    answers: Answers,
    settings: PpoSettings,
    value_offset: float,
) -> Scored:
    """Return the numbers of all roles for a rollout.

    With `settings.mixed_adapter_scoring` the roles go through the base together, each row under its own adapter;
    otherwise one after the other. Both give the same numbers within rounding.
    """
    with attention_for_gradients(base.causal_lm):  # as the update computes them: the ratio starts at 1
        return _scored_rollout(base, rollout, reward, answers, settings, value_offset)


def _scored_rollout(
    base: SharedBase,
    rollout: Rollout,
    reward: CombinedReward,
    answers: Answers,
    settings: PpoSettings,
    value_offset: float,
) -> Scored:
    batch = settings.scoring_batch_size
    own = [s for s in reward.sources if isinstance(s, AdapterReward) and s.role == REWARD]
    parts: list[tuple[torch.Tensor, ...]] = []
    order = list(batches_by_length(rollout.mask, torch.arange(len(rollout.texts), device=base.device), batch))
    for rows in order:
        ids, mask, action = rollout.ids[rows], rollout.mask[rows], rollout.action_mask[rows]
        if settings.mixed_adapter_scoring and own:
            many = torch.cat([ids, ids, ids, rollout.text_ids[rows]])
            masks = torch.cat([mask, mask, mask, rollout.text_mask[rows]])
            roles = [role for role in (POLICY, REFERENCE, VALUE, REWARD) for _ in range(len(ids))]
            policy, reference, value, text = base.hidden_mixed(roles, many, masks).chunk(4)
            raw = base.head_outputs(REWARD, last_real(text, rollout.text_mask[rows]))
        else:
            policy, reference, value = (base.hidden(role, ids, mask) for role in (POLICY, REFERENCE, VALUE))
            raw = torch.empty(0)
        logprobs, entropy = base.response_logprobs(
            policy, ids, action, settings.temperature, settings.logits_chunk_size
        )
        ref, _ = base.response_logprobs(
            reference, ids, action, settings.temperature, settings.logits_chunk_size, with_entropy=False
        )
        parts.append((logprobs, ref, entropy, state_values(base, value, action, value_offset), raw))
    back = torch.cat(order).argsort()
    logprobs, ref, entropy, values, raw = (
        torch.cat(column)[back] if len(column[0]) else column[0] for column in zip(*parts, strict=True)
    )
    known = {own[0].name: raw} if own and len(raw) else {}
    score, raw_scores = reward.scores(answers, known)
    return Scored(logprobs, ref, entropy, values, score, raw_scores)


def state_values(base: SharedBase, states: torch.Tensor, action_mask: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the values [batch, R + 1] of states 0..L (state t has seen t tokens of the answer), 0 where masked."""
    width = action_mask.shape[1] + 1
    return (base.head_outputs(VALUE, states[:, -width:]) + offset) * value_mask(action_mask)
