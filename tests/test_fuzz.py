"""Bad input of every kind: an error in one line or a right result; no traceback, no hang, nothing wrong in silence.

What is right is said beside each kind, in fuzz_configs, fuzz_data and fuzz_folders.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import fuzz_configs
import fuzz_data
import fuzz_folders
import pytest
import torch
from fuzz_inputs import Bench, Hang, bounded, edited
from hypothesis import HealthCheck, given, settings

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import LoraSettings, RunConfig

TARGETS = fuzz_configs.TARGETS | fuzz_data.TARGETS | fuzz_folders.TARGETS
FEW, MANY, SECONDS = 40, 200, 10.0
"""Inputs of each kind in the everyday run and in the slow one, and the longest that one may take."""


@pytest.fixture(scope="module")
def bench(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    config = RunConfig(model_name_or_path=str(tiny_folder), dtype="float32", lora=LoraSettings(r=4, lora_alpha=8))
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), torch.float32)
    folder = tmp_path_factory.mktemp("fuzz")
    base.new_adapter(REWARD, lora_config(config.lora), trainable=False)
    base.save_adapter(REWARD, folder / "saved")
    files = {path.name: path.read_bytes() for path in (folder / "saved").iterdir()}
    parameters = sum(p.numel() for p in base.parameters(REWARD))
    return Bench(folder, base, load_tokenizer(config), files, parameters)


def tried(name: str, examples: int, bench: Bench, same_each_time: bool = False) -> int:
    """Try so many inputs of a kind; return how many there were."""
    inputs, check = TARGETS[name]
    count = 0

    @settings(max_examples=examples, database=None, derandomize=same_each_time, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def one(case: Any) -> None:
        nonlocal count
        count += 1
        with bounded(SECONDS):
            check(bench, case)

    one()
    return count


@pytest.mark.parametrize("name", TARGETS)
def test_some_bad_inputs_of_each_kind(bench: Bench, name: str) -> None:
    assert tried(name, FEW, bench, same_each_time=True) >= FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_bad_inputs_of_each_kind(bench: Bench, name: str) -> None:
    count = tried(name, MANY, bench)
    print(f"{name}: {count} inputs")
    assert count >= MANY


def test_the_slow_run_tries_two_thousand_inputs() -> None:
    assert len(TARGETS) * MANY >= 2000


def test_a_hang_is_caught_though_errors_are_held_back() -> None:
    with pytest.raises(Hang), bounded(0.05):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))


def test_edits_change_what_they_say() -> None:
    assert edited(b"abcdef", [("set", 1, b"XY", 1)]) == b"aXYdef"
    assert edited(b"abcdef", [("insert", 1, b"XY", 1)]) == b"aXYbcdef"
    assert edited(b"abcdef", [("delete", 8, b"-", 2)]) == b"adef"
    assert edited(b"abcdef", [("cut", 2, b"-", 1), ("copy", 0, b"-", 2)]) == b"abab"
    assert edited(b"a", [("flip", 0, b"-", 1)]) == b"c"
