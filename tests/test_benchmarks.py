"""The benchmarks run, small, on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_one_step_of_the_24_gb_config_on_a_random_mistral() -> None:
    words = [
        "--hidden_size",
        "64",
        "--layers",
        "2",
        "--vocab_size",
        "600",
        "--batch_size",
        "4",
        "--response_length",
        "8",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "mistral_shape.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["hidden_size"] == 64 and figures["peak_gib"] > 0 and figures["update"] > 0
