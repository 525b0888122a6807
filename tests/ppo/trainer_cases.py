"""What the tests of the PPO trainer share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.base.shared import POLICY, VALUE
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.ppo.trainer import PpoTrainer

TIMINGS = {"seconds_rollout", "seconds_score", "seconds_update", "samples_per_second", "peak_memory_gib"}

Metrics = dict[str, float]
MakeTrainer = Callable[..., PpoTrainer]


def text_length(prompts: Any, completions: Any, **_: Any) -> list[int]:
    return [len(c[0]["content"]) for c in completions]


def settled(metrics: Metrics) -> Metrics:
    """The metrics that do not depend on the clock."""
    return {name: value for name, value in metrics.items() if name not in TIMINGS}


def weights(trainer: PpoTrainer, *roles: str) -> list[torch.Tensor]:
    return [p.detach().clone() for role in roles or (POLICY, VALUE) for p in trainer.base.parameters(role)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def close_metrics(one: Metrics, other: Metrics, tolerance: float) -> None:
    assert settled(one) == pytest.approx(settled(other), abs=tolerance)


def rolled_and_scored(trainer: PpoTrainer, count: int = 6) -> tuple[Rollout, Any]:
    chosen = trainer._next_prompts(count)
    rollout = trainer._rollout(POLICY, chosen)
    return rollout, trainer._scored(rollout, chosen)


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., None]) -> None:
    """Let `note` see the arguments of every call of `owner.name`, which works as before."""
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
