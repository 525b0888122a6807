"""A run that is killed at any moment, and started again by the same command, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import ROOT, TINY, outcome

from lora_rlhf.run import STAGES, run_summary

OPTIONS = [*TINY, "--ppo.total_steps", "5", "--save_steps", "1"]


def run(folder: Path, kill_at: str = "never") -> int:
    """Run the pipeline, as `killed_at.py` says; return its status."""
    command = [sys.executable, "tests/killed_at.py", str(folder), kill_at, "recipes/direct_rlhf_lora.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log(folder).open("ab") as printed:
        return subprocess.run(
            [*command, *OPTIONS, "--output_dir", str(folder)],
            cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=600, check=False,
        ).returncode  # fmt: skip


def log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Counter[str]]:
    """What an uninterrupted run leaves, and how often it touches its files in each stage."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0, log(folder).read_text()
    found = outcome(folder)
    assert len(found["metrics"]) == 5 and len(found["weights"]) >= 5
    assert not (folder / "checkpoints").exists()
    touched = Counter(json.loads((folder.parent / "run.touched").read_text()))
    assert set(touched) == set(STAGES)
    return found, touched


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed else []) for seed in range(6)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    whole: tuple[dict[str, Any], Counter[str]], tmp_path: Path, seed: int
) -> None:
    """Once in every stage, at a moment drawn from all those at which it touches a file; thirty of them are slow."""
    expected, touched = whole
    chosen = random.Random(100 + seed)
    folder = tmp_path / "run"
    for stage in STAGES if seed else ("reward", "ppo"):
        moment = chosen.randint(1, touched[stage])
        assert run(folder, f"{stage}:{moment}") == -signal.SIGKILL, log(folder).read_text()
        assert stage not in run_summary(folder).get("seconds", {})
    assert run(folder) == 0, log(folder).read_text()
    assert outcome(folder) == expected
