"""The stages as functions on one session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_rlhf.config import RunConfig
from lora_rlhf.data import preferences
from lora_rlhf.stages import Session, base_stage, reward_stage


def test_each_split_of_a_data_set_is_read_once(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_pairs=8, max_eval_pairs=4)
    config.reward.max_steps = 1
    read: list[Any] = []
    whole = preferences.dataset_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(preferences, "dataset_rows", counted)
    session = Session.open(config)
    base_stage(session)
    reward_stage(session)
    assert len(read) == len({str(args) for args in read}) == 2  # train and test
