"""The benchmarks run, small, on any machine, and end with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def figures(name: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_least_seconds_of_the_24_gb_config_on_a_4090() -> None:
    config = str(ROOT / "recipes" / "configs" / "mistral_7b_24gb.yaml")
    counted = figures("roofline.py", "--config", config, "--card", "rtx4090", "--json")
    assert counted["seconds_per_step"] <= 60 and counted["peak_gib"] <= 16
    with_head = figures("roofline.py", "--config", config, "--card", "rtx4090", "--json", "--ppo.value_model", "head")
    assert with_head["seconds_per_step"] <= 40


def test_the_parts_of_a_counted_step_add_up() -> None:
    counted = figures(
        "roofline.py", "--config", "recipes/configs/tiny.yaml", "--dtype", "bfloat16", "--card", "L4", "--json"
    )
    phases = counted["phases"]
    assert sum(phase["seconds"] for phase in phases) == pytest.approx(counted["seconds_per_step"])
    assert {phase["stage"] for phase in phases} == {"rollout", "score", "update"}
    kinds = counted["kinds"].values()
    assert sum(kind["seconds"] for kind in kinds) == pytest.approx(counted["seconds_per_step"])


@pytest.mark.slow
def test_a_step_of_both_value_models() -> None:
    shape = ["--model", "tiny", "--batch", "4", "--micro", "2", "--prompt", "8", "--response", "4", "--rounds", "1"]
    found = figures("ppo_step.py", *shape)
    assert {"seconds", "peak_gib", "floor_ratio", "seconds_head", "peak_gib_head", "floor_ratio_head"} == found.keys()
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_rollouts_by_every_engine() -> None:
    shape = ["--model", "tiny", "--dtype", "float32", "--batch", "2", "--prompt", "8", "--response", "4"]
    found = figures("rollout.py", *shape, "--rounds", "1")
    assert found["tokens_per_second"].keys() == {"expanded 2x4", "4-bit 2x4", "generate 2x4"} and found["speedup"] > 0


@pytest.mark.slow
def test_exponents_and_memory_over_steps() -> None:
    found = figures("scaling.py", "--hidden_size", "64", "--layers", "1", "--rounds", "1", "--steps", "20")
    assert found["exponents"].keys() == {"batch", "prompt", "response", "rank"} and found["steps"] == 20
    assert abs(found["memory_growth"]) < 0.5


@pytest.mark.slow
def test_predicted_and_measured_peak_of_the_wide_shape() -> None:
    found = figures("memory.py", "--only", "7")["shapes"]["wide Mistral"]
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.3)


def test_arms_together_and_alone() -> None:
    found = figures(
        "chat.py", "--model", "tiny", "--dtype", "float32", "--prompt", "8", "--tokens", "4", "--rounds", "1"
    )
    assert found["ratio"] > 0 and len(found["seconds"]) == 8
