"""The clipped losses of PPO and the KL estimators: pure functions on tensors."""

from __future__ import annotations

from typing import Literal

import torch

from lora_rlhf.ppo.advantages import masked_mean

MOST_ERROR = 0.2
"""Of the KL, relative to its target, that the adaptive coefficient goes by."""


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, kind: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Return a per-token estimate of KL(policy ‖ reference) from tokens that the policy sampled.

    With d = logp − logp_ref: k1 = d (unbiased), k2 = d²/2 (biased, never negative), k3 = e^{−d} − 1 + d (unbiased and
    never negative). Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    difference = logprobs - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    return torch.expm1(-difference) + difference


def policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, clipped share): the mean over real tokens of max(−A·ρ, −A·clip(ρ, 1 ± cliprange)).

    ρ = exp(logp − logp_old); Schulman et al. 2017, equation 7.
    """
    ratio = torch.exp(logprobs - old)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    share = masked_mean((clipped > plain).float(), mask)
    return masked_mean(torch.maximum(plain, clipped), mask), share


def importance_weights(trainer: torch.Tensor, sampler: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(exp(logp_trainer − logp_sampler), cap) per token: truncated importance sampling (Yao et al. 2025).

    Advantages times these weights make up for tokens that were sampled from slightly other probabilities than the
    trainer's, in expectation, and exactly so where the cap is not reached.
    """
    return torch.exp(trainer - sampler).clamp(max=cap)


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, clipped share): half the mean over real states of the larger squared error, clipped or not.

    The clipped value stays within ± cliprange of the old one; Huang et al. 2024.
    """
    near = torch.minimum(torch.maximum(values, old - cliprange), old + cliprange)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    share = masked_mean((clipped > plain).float(), mask)
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), share


class FixedKl:
    """A KL coefficient that stays."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, answers: int) -> None:
        """Take note of the mean KL per answer; nothing changes."""


class AdaptiveKl(FixedKl):
    """A KL coefficient that holds the KL per answer near a target (Ziegler et al. 2019, section 2.2).

    β ← β · (1 + clip(KL / target − 1, ±0.2) · answers / horizon)

    So over N answers it changes by a factor of about e^(0.2 · N / horizon) at most, whatever the KL does.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, answers: int) -> None:
        """Move the coefficient after `answers` answers whose mean KL was `kl` nats."""
        error = min(max(kl / self.target - 1, -MOST_ERROR), MOST_ERROR)
        self.coef *= 1 + error * answers / self.horizon

    def reach(self, steps: int, answers: int) -> float:
        """Return the factor by which `steps` updates after `answers` answers each can raise the coefficient at most."""
        return (1 + MOST_ERROR * answers / self.horizon) ** steps
