"""Running recipes as a user does."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--config", "recipes/configs/tiny.yaml"]
TIMINGS = {"seconds_rollout", "seconds_score", "seconds_update", "samples_per_second", "peak_memory_gib"}


IN_STAGES = {
    "base": ("lora_rlhf.session.preference_pairs", 2),
    "reward": ("lora_rlhf.trl_trainer._Bar.on_step_end", 2),
    "instruct": ("lora_rlhf.trl_trainer._Bar.on_step_end", 2),
    "ppo": ("lora_rlhf.ppo.trainer.PpoTrainer.step", 2),
    "merge": ("lora_rlhf.stages.merge_drift", 2),
    "compare": ("lora_rlhf.stages.role_answers", 3),
}
"""Stage → what is called in it, and in which of its calls `in_stage` comes in."""


@contextlib.contextmanager
def in_stage(monkeypatch: pytest.MonkeyPatch, stage: str, happens: Callable[[], object]) -> Iterator[None]:
    """Let something happen in the middle of a stage of the runs inside the block."""
    name, wanted = IN_STAGES[stage]
    plain, calls = pkgutil.resolve_name(name), itertools.count(1)

    def disturbed(*args: Any, **options: Any) -> Any:
        its_own = getattr(args[0], "name", stage) == stage  # reward and SFT training have the same callback
        if its_own and next(calls) == wanted:
            happens()
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(name, disturbed)
        yield


def as_process(recipe: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe as a user does."""
    command = [sys.executable, f"recipes/{recipe}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads wait for each other where the cores are busy
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)


def assert_one_line_of_error(status: int, printed: str, *words: str) -> None:
    lines = printed.rstrip("\n").split("\n")
    assert status == 2
    assert "Traceback" not in printed
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    for word in words:
        assert word in lines[-1]


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
