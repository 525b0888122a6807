"""A run that is killed at any moment, and started again by the same command, ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import ROOT, TINY

TIMINGS = {"seconds_rollout", "seconds_score", "seconds_update", "samples_per_second", "peak_memory_gib"}
RUN = ["direct_rlhf_lora.py", *TINY, "--ppo.total_steps", "5", "--save_steps", "1"]


def started(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, f"recipes/{RUN[0]}", *RUN[1:], "--output_dir", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8")


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, but for times: digests of weights, metrics, summary and samples."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    stages = sorted(summary.pop("seconds"))
    for name in ("seconds_per_step", "peak_memory_gib"):
        summary["ppo"].pop(name)
    weights = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }
    return {
        "weights": weights,
        "metrics": [{name: value for name, value in m.items() if name not in TIMINGS} for m in metrics],
        "summary": summary,
        "stages": stages,
        "samples": json.loads((folder / "samples.json").read_text(encoding="utf-8")),
        "files": sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != ".lock"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """An uninterrupted run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    assert started(folder).wait(timeout=600) == 0, log_of(folder)
    found = outcome(folder)
    assert len(found["metrics"]) == 5 and len(found["weights"]) >= 5
    assert not (folder / "checkpoints" / "ppo").exists()
    return found, time.monotonic() - begun


def killed_until_done(folder: Path, moments: list[float]) -> int:
    """Start, kill after each of these seconds, start again; at last let it end. Return how many were killed alive."""
    killed = 0
    for seconds in moments:
        process = started(folder)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert started(folder).wait(timeout=600) == 0, log_of(folder)
    return killed


def test_a_run_that_is_killed_ends_as_one_that_is_not(whole: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    """In the middle of PPO, and right after it."""
    folder = tmp_path / "run"
    for sign in (folder / "checkpoints" / "ppo" / "step_000002", folder / "policy_adapter"):
        process = started(folder)
        while not sign.exists():
            assert process.poll() is None, log_of(folder)
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert started(folder).wait(timeout=600) == 0, log_of(folder)
    assert "going on after step" in log_of(folder)
    assert outcome(folder) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_six_kills_at_random_moments(whole: tuple[dict[str, Any], float], tmp_path: Path, seed: int) -> None:
    """Thirty in all, over all stages and saves."""
    expected, seconds = whole
    chosen = random.Random(100 + seed)
    moments = [chosen.uniform(0.25, 1.0) * seconds for _ in range(6)]
    assert killed_until_done(tmp_path / "run", moments) >= 1  # how long the whole took depends on who else is at work
    assert outcome(tmp_path / "run") == expected
