"""What policy and value learn from a minibatch: the gradients of its losses, a micro-batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.packing import batches_by_length
from lora_rlhf.base.shared import POLICY, VALUE, SharedBase
from lora_rlhf.config import PpoSettings
from lora_rlhf.ppo.advantages import masked_mean, value_mask
from lora_rlhf.ppo.losses import kl_estimate, policy_loss, value_loss
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.ppo.scoring import Scored, state_values
from lora_rlhf.processes import Processes

Metrics = dict[str, float]
LEARNED = ("policy_loss", "clip_fraction", "ratio", "update_kl", "ratio_deviation", "value_loss", "value_clip_fraction")
"""What a minibatch's update is measured by."""


@dataclass(frozen=True)
class Batch:
    """A step's answers, and what is to be learned from them.

    Attributes:
        rollout: the answers.
        scored: what all roles said of them.
        advantages: [batch, R], whitened.
        returns: [batch, R + 1].
    """

    rollout: Rollout
    scored: Scored
    advantages: torch.Tensor
    returns: torch.Tensor


def add_gradients(
    base: SharedBase,
    batch: Batch,
    rows: torch.Tensor,
    *,
    settings: PpoSettings,
    processes: Processes,
    value_offset: float,
    loss_scale: float,
    warming: bool,
    micro_batch_size: int,
) -> Metrics:
    """Add the gradients of this process's rows of a minibatch to those that the parameters have.

    Args:
        base: plays the roles.
        batch: all of the step.
        rows: the minibatch, numbers of the whole batch.
        settings: of PPO.
        processes: that share the minibatch; all processes' gradients together are those of one pass over all of it.
        value_offset: added to what the value head says.
        loss_scale: factor of the loss.
        warming: whether the policy stays as it is.
        micro_batch_size: answers in one forward-backward pass.

    Returns:
        `LEARNED`, the share of this process in each.
    """
    s, rollout, scored = settings, batch.rollout, batch.scored
    advantages, returns = batch.advantages, batch.returns
    tokens = rollout.action_mask[rows].sum()
    states = value_mask(rollout.action_mask[rows]).sum()
    sums: Metrics = dict.fromkeys(LEARNED, 0.0)
    own_rows = processes.learned_rows(rows)
    for micro in batches_by_length(rollout.mask, own_rows, micro_batch_size) if len(own_rows) else ():
        ids, mask, action = rollout.ids[micro], rollout.mask[micro], rollout.action_mask[micro]
        state_mask, old = value_mask(action), scored.logprobs[micro]
        at = processes.own_number(micro, len(rollout.texts))
        common = None if scored.common is None else scored.common[at]
        share, state_share = (action.sum() / tokens).item(), (state_mask.sum() / states).item()

        # Backward ends before another role is played; see SharedBase on checkpointing.
        hidden = base.hidden(POLICY, ids, mask, common)
        logprobs, _ = base.response_logprobs(
            hidden, ids, action, s.temperature, s.logits_chunk_size, with_entropy=False
        )
        loss, clipped = policy_loss(logprobs, old, advantages[micro], action, s.cliprange)  # 13.
        learned: Any = 0.0 if warming else loss * share
        with torch.no_grad():
            ratio = torch.exp(logprobs - old)
            now = {
                "policy_loss": loss.item() * share,
                "clip_fraction": clipped.item() * share,
                "ratio": masked_mean(ratio, action).item() * share,
                "update_kl": masked_mean(kl_estimate(old, logprobs, "k3"), action).item() * share,
            }
            deviation = ((ratio - 1).abs() * action).max().item()
        if s.trains_value_adapter:
            if not warming:
                (loss_scale * learned).backward()
            del hidden, logprobs, loss, learned
            hidden, learned = base.hidden(VALUE, ids, mask, common), 0.0
        elif warming:
            hidden = hidden.detach()  # the head learns alone
        values = state_values(base, hidden, action, value_offset)
        loss, clipped = value_loss(values, scored.values[micro], returns[micro], state_mask, s.cliprange_value)  # 13.
        (loss_scale * (learned + s.vf_coef * loss * state_share)).backward()
        now |= {"value_loss": loss.item() * state_share, "value_clip_fraction": clipped.item() * state_share}
        sums = {name: sums[name] + value for name, value in now.items()} | {
            "ratio_deviation": max(sums["ratio_deviation"], deviation)
        }
    return sums
