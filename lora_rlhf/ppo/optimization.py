"""PPO's optimizer, its learning rate, and the loss scale of float16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.errors import UserError

ADAM_EPSILON = 1e-5
"""As in PPO's first implementation, and for language models in Huang et al. 2024; Adam's own default is 1e-8."""


def adam(groups: list[dict[str, Any]], optim: str) -> torch.optim.Optimizer:
    """16. Return Adam, its moments in float32 or, paged, in 8 bits."""
    check_optim(optim)
    if optim == "adam":
        return torch.optim.Adam(groups, eps=ADAM_EPSILON, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdam8bit(groups, eps=ADAM_EPSILON)


def check_optim(optim: str) -> None:
    """Raise `UserError` for an optimizer that this machine cannot run."""
    if optim != "adam" and not torch.cuda.is_available():
        raise UserError("ppo.optim: paged_adam_8bit needs CUDA; set ppo.optim: adam")


def load_adam(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer of `adam` the state of another one; moments that are paged stay so."""
    optimizer.load_state_dict(state)
    if (new_buffer := getattr(optimizer, "get_state_buffer", None)) is None:
        return
    for parameter, own in optimizer.state.items():
        for name in own.keys() & {"state1", "state2"}:
            buffer = new_buffer(parameter, dtype=own[name].dtype)
            own[name] = buffer.copy_(own[name])


def learning_rate_share(step: int, total: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at `step` (from 0): up over the warm-up, then down to 0 at `total`.

    Args:
        step: any number from 0; the scheduler asks once more after the last step, which is `total - 1`.
        total: steps of the run, at least 1.
        warmup_ratio: share of the steps over which the rate rises, from 0 to 1; at 1 it never falls before the end.
    """
    warmup = round(warmup_ratio * total)
    if step >= total:
        return 0.0
    return (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)


FIRST_SCALE, LARGEST_SCALE, FINITE_BEFORE_GROWTH = 2.0**16, 2.0**24, 200


@dataclass
class LossScale:
    """What a loss is multiplied by before backward; its gradients are divided by it afterwards, in float32.

    Float16 has no numbers below 6e-8, where many gradients are, and none above 65504. So the scale is as large as it
    can be: it is halved where a gradient overflows, and doubled after `FINITE_BEFORE_GROWTH` that did not (Micikevicius
    et al. 2018). It is a power of two, which rounds nothing. Other dtypes have the exponents of float32: it stays 1.

    Attributes:
        adapts: whether it changes.
        scale: the factor.
        finite: gradients in a row that did not overflow.
    """

    adapts: bool = False
    scale: float = 1.0
    finite: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """Return the scale with which training in `dtype` begins."""
        return cls(True, FIRST_SCALE) if dtype == torch.float16 else cls()

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients, where there are any, by the scale."""
        if gradients := [p.grad for p in parameters if p.grad is not None and self.scale != 1]:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def shrink(self) -> bool:
        """Halve the scale after an overflow; return whether there is a smaller one to try."""
        self.finite = 0
        if not self.adapts or self.scale <= 1:
            return False
        self.scale /= 2
        return True

    def note_finite(self) -> None:
        """Count a gradient that did not overflow."""
        self.finite += 1
        if self.adapts and self.finite >= FINITE_BEFORE_GROWTH and self.scale < LARGEST_SCALE:
            self.scale, self.finite = 2 * self.scale, 0


def clipped_gradients(
    minibatch: Callable[[], dict[str, float]],
    parameters: Mapping[str, Sequence[torch.nn.Parameter]],
    max_norm: float,
    loss_scale: LossScale,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Leave the clipped gradient of a minibatch in its parameters; return its numbers and the norms before clipping.

    Each role's gradient is clipped by its own norm: by a common one, a value head of large gradient would shorten the
    policy's steps.

    Where float16 overflows, the same minibatch is tried again with a smaller scale, so that none is lost. What is not
    finite in the forward pass, or at scale 1 either, is no fault of the scale, which is then left as it was.

    Args:
        minibatch: takes the gradient of the scaled loss, anew each time, and returns the numbers of its forward pass.
        parameters: all that learn, by role.
        max_norm: of a role's gradient.
        loss_scale: is changed.

    Returns:
        The numbers of the last forward pass, and the norm by role; 0 for a role that no gradient reached.
    """
    first = loss_scale.scale
    while True:
        numbers = minibatch()
        norms = {}
        for role, own in parameters.items():
            loss_scale.unscale(own)
            norms[role] = torch.nn.utils.clip_grad_norm_(own, max_norm)
        if not loss_scale.adapts or all(bool(torch.isfinite(norm)) for norm in norms.values()):
            return numbers, norms
        if not all(map(math.isfinite, numbers.values())) or not loss_scale.shrink():
            loss_scale.scale = first
            return numbers, norms
