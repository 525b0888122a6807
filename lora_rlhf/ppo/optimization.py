"""PPO's optimizer and its learning rate."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.errors import UserError


def adam(groups: list[dict[str, Any]], optim: str) -> torch.optim.Optimizer:
    """16. Return Adam with ε 1e-5, its moments in float32 or, paged, in 8 bits."""
    check_optim(optim)
    if optim == "adam":
        return torch.optim.Adam(groups, eps=1e-5, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdam8bit(groups, eps=1e-5)


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
    """Return the share of the peak learning rate at `step` (from 0): up over the warm-up, then down to 0 at `total`."""
    warmup = round(warmup_ratio * total)
    return (step + 1) / warmup if step < warmup else max(0.0, (total - step) / (total - warmup))
