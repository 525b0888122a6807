"""The last policy within `ppo.max_kl`, which PPO goes back to where the next one is past the limit.

A step's KL is measured on answers of the policy that the step begins with. So where step t measures too much, its batch
teaches nothing, and it was the update of the step before that went too far: the policy to keep is that of the last step
whose answers were within the limit, as that step began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class PolicyWithinLimit:
    """A copy, in main memory, of what a step began with whose answers were within the limit.

    Attributes:
        step: that step, from 1; 0 where there is none yet.
        kl: what it measured, in nats per answer.
        parameters: of policy and value, by role.
    """

    step: int = 0
    kl: float = 0.0
    parameters: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def keep(self, parameters: Mapping[str, Sequence[torch.Tensor]], step: int, kl: float) -> None:
        """Copy the parameters over those that were kept before."""
        if not self.parameters:
            self.parameters = {
                role: [torch.empty_like(p, device="cpu") for p in own] for role, own in parameters.items()
            }
        for role, own in parameters.items():
            for kept, parameter in zip(self.parameters[role], own, strict=True):
                kept.copy_(parameter)
        self.step, self.kl = step, kl

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Copy what was kept, if anything, back into the parameters."""
        for role, kept in self.parameters.items():
            for parameter, copy in zip(parameters[role], kept, strict=True):
                parameter.copy_(copy)

    def said(self, kl: float, limit: float, step: int) -> str:
        """Return why the run ends at `step`, whose answers measured `kl`, and which policy it leaves."""
        passed = f"KL per answer {kl:.1f} passed ppo.max_kl {limit:g} at step {step}"
        if self.step:
            return f"{passed}; the policy kept is the one that step {self.step} began with, at KL {self.kl:.1f}"
        return f"{passed}; that policy is kept, for no earlier one is known to be within it"
