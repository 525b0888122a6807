"""Token rewards, generalised advantage estimation and whitening: pure functions on tensors.

Steps of an answer with L real tokens, in arrays of width R + 1 (R tokens at most): step t < L emits token t, seen from
state t; step L is the state after the last token, where the reward model reads its score. So the value mask (t ≤ L)
reaches one step past the log-prob mask (t < L), as in Huang et al. 2024.
"""

from __future__ import annotations

import torch


def value_mask(action_mask: torch.Tensor) -> torch.Tensor:
    """Return the mask [batch, R + 1] of states 0..L from the mask [batch, R] of tokens 0..L-1."""
    return torch.nn.functional.pad(action_mask, (1, 0), value=True)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of `values` where `mask` is true; 0 where it is true nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, keep_mean: bool = False) -> torch.Tensor:
    """Return `values` scaled to variance 1 over the mask, with mean 0 or (`keep_mean`) their own; 0 outside it.

    The variance is the unbiased one; Huang et al. 2024, "whiten".
    """
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = (((values - mean) ** 2) * mask).sum() / (count - 1).clamp(min=1)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (white + mean if keep_mean else white) * mask


def token_rewards(kl: torch.Tensor, kl_coef: float, score: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """Return rewards [batch, R + 1]: −β·KL at each token, and the score at the state of the last one.

    Args:
        kl: [batch, R] estimate per token.
        kl_coef: β.
        score: [batch].
        action_mask: [batch, R], true for real tokens, which come first.
    """
    rewards = torch.nn.functional.pad(-kl_coef * kl * action_mask, (0, 1))
    lengths = action_mask.sum(1, keepdim=True)
    return rewards.scatter_add(1, lengths, score[:, None])


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generalised advantages and returns (advantage + value, before any whitening), 0 outside the mask.

    A_t = Σ_k (γλ)^k δ_{t+k}, with δ_t = r_t + γ V_{t+1} − V_t and V = 0 past the end (Schulman et al. 2016).

    Args:
        rewards: [batch, steps].
        values: [batch, steps].
        mask: [batch, steps], true for real steps, which come first.
        gamma: discount γ.
        lam: λ.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(running)
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        advantages[:, t] = running
    advantages = advantages * mask
    return advantages, (advantages + values) * mask
