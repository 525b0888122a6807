"""When a checkpoint is due."""

from __future__ import annotations

import pytest

from lora_rlhf.config import RunConfig
from lora_rlhf.ppo_steps import _is_due


@pytest.mark.parametrize(
    ("save_steps", "save_minutes", "step", "seconds", "due"),
    [
        (20, 10.0, 20, 1.0, True),
        (20, 10.0, 21, 1.0, False),
        (20, 10.0, 21, 600.0, True),
        (20, 10.0, 21, 599.0, False),
        (0, 10.0, 20, 1.0, False),
        (0, 0.5, 1, 30.0, True),
        (0, 0.0, 20, 1e9, False),
        (1, 0.0, 7, 0.0, True),
    ],
)
def test_every_so_many_steps_and_minutes(
    save_steps: int, save_minutes: float, step: int, seconds: float, due: bool
) -> None:
    assert _is_due(RunConfig(save_steps=save_steps, save_minutes=save_minutes), step, seconds) is due
