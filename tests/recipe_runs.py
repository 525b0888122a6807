"""Running recipes as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ["--config", "recipes/configs/tiny.yaml"]


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
