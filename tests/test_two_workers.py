"""What two real processes send each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from launched_runs import free_port
from recipe_runs import ROOT


def test_what_two_processes_come_to_together() -> None:
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        subprocess.Popen(
            [sys.executable, "tests/two_workers.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [worker.communicate(timeout=100)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    both = [json.loads(lines.splitlines()[-1]) for lines in printed]
    assert both[0] == both[1] == {
        "seen by libraries": 1,
        "gradients": {
            "both, 24 bytes": [3.0],  # 1 and 2
            "second alone, 8 bytes": [2.0],
            "nobody": None,
            "both, 40 bytes": [3.0],
        },
        "in place": True,
        "whole": {
            "texts": ["a", "b", "c", "d", "e"],
            "numbers": [f"tensor([{2 * i}., {2 * i + 1}.])" for i in range(5)],
        },
        "numbers": {"sum": 3.0, "largest": 2.0, "second alone": 7.0},
        "again": [True, 1.0, "of 1.0"],
    }  # fmt: skip
