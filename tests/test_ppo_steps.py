"""When a checkpoint is due, and what is said before the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.ppo_steps import _is_due, slow_controller

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))


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


def test_a_kl_coefficient_that_can_hardly_move_in_the_run_is_said() -> None:
    adaptive = PpoSettings(adaptive_kl=True, total_steps=400, batch_size=64, kl_horizon=10_000)
    said = "ppo.kl_horizon 10000 is long for 25600 answers: kl_coef can change by ×1.67 at most"  # 1.00128^400
    assert said in (slow_controller(adaptive) or "") and "with 1024 it can by ×144" in (slow_controller(adaptive) or "")
    for settings in (replace(adaptive, kl_horizon=4_000), replace(adaptive, adaptive_kl=False)):  # e^1.28 = 3.6
        assert slow_controller(settings) is None


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_kl_coefficient_of_every_config_can_change_thirtyfold(file: Path) -> None:
    s = config_from_file(file).ppo
    assert not s.adaptive_kl or 0.2 * s.total_steps * s.batch_size / s.kl_horizon > math.log(30)
