"""The scales of a run's rewards: read as they were written, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.reward.sources import ScoreScale, run_reward, score_scales


def write(folder: Path, scales: Any) -> None:
    (folder / "score_scales.json").write_text(json.dumps({"scales": scales}))


def test_scales_come_back(tmp_path: Path) -> None:
    write(tmp_path, {"a": {"mean": -1.5, "std": 2.0}, "b": {"mean": 0, "std": 1e-6}})
    assert score_scales(tmp_path) == {"a": ScoreScale(-1.5, 2.0), "b": ScoreScale(0, 1e-6)}


@pytest.mark.parametrize(
    "scales",
    [
        {"a": {"mean": float("nan"), "std": 1}}, {"a": {"mean": 0, "std": 0}}, {"a": {"mean": 0, "std": -1}},
        {"a": {"mean": 0, "std": float("inf")}}, {"a": {"mean": "0", "std": 1}}, {"a": {"mean": 0, "std": 1, "n": 3}},
        {"a": [0, 1]}, [], None,
    ],
    ids=str,
)  # fmt: skip
def test_scales_that_would_spoil_every_score_are_refused(tmp_path: Path, scales: Any) -> None:
    write(tmp_path, scales)
    with pytest.raises(UserError, match=r"score_scales\.json is no file of score scales"):
        score_scales(tmp_path)


def test_a_source_without_a_scale_is_named(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    make_base(roles=(REWARD,)).save_adapter(REWARD, tmp_path / "reward_adapter")
    for name, known in (("reward", True), ("rewerd", False)):
        write(tmp_path, {name: {"mean": 0.5, "std": 2.0}})
        base = make_base(roles=())
        if known:
            reward = run_reward(make_config(), base, tmp_path)
            assert [source.name for source in reward.sources] == ["reward"]
            continue
        with pytest.raises(UserError, match="no scale of reward:"):
            run_reward(make_config(), base, tmp_path)
