"""Whether a run trains its own reward: its stages, the planner, the hours and the watcher say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_to_mapping
from lora_rlhf.memory_plan import Planner
from lora_rlhf.model_shape import model_shape
from lora_rlhf.reward.own_reward import trains_own_reward
from lora_rlhf.reward.sources import source_entries
from lora_rlhf.roofline.cards import CARDS
from lora_rlhf.roofline.hours import stage_times
from lora_rlhf.watched_run import read_run

OTHER = {"kind": "function", "path": "math:fsum"}


@pytest.mark.parametrize(
    ("sources", "own"),
    [
        ([], True),
        ([{"kind": "adapter"}], True),
        ([{"kind": "adapter", "path": None}], True),
        ([{"kind": "adapter", "path": ""}], True),
        ([OTHER, {"kind": "adapter"}], True),
        ([OTHER], False),
        ([{"kind": "adapter", "path": "some/reward"}], False),
    ],
)
def test_all_say_the_same(
    make_config: Callable[..., RunConfig], tmp_path: Path, sources: list[dict[str, Any]], own: bool
) -> None:
    config = make_config()
    config = replace(
        config,
        ppo=replace(config.ppo, reward_sources=sources),
        reward=replace(config.reward, max_steps=3),
        sft=replace(config.sft, max_steps=3),
    )
    assert trains_own_reward(sources) == own
    assert (not sources or None in [entry.path for entry in source_entries(config)]) == own
    plans = Planner(config, model_shape(config), on_cuda=True, expand=False).stages()
    assert ("reward" in [plan.name for plan in plans]) == own
    card = next(iter(CARDS.values()))
    assert ("reward" in [time.stage for time in stage_times(config, card)]) == own
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_mapping(config)))
    (watched,) = (stage for stage in read_run(tmp_path).stages if stage.name == "reward")
    assert (watched.state != "not needed") == own
