"""Run a recipe of several processes, in which the second one's gradient, or loss, of optimizer step 2 has NaN in it.

accelerate launch … tests/nan_in_the_second.py gradient RECIPE OPTIONS…
accelerate launch … tests/nan_in_the_second.py loss RECIPE OPTIONS…
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import transformers
import trl

from lora_rlhf.processes import Processes

what, sys.argv = sys.argv[1], sys.argv[2:]
is_second, plain, sums = os.environ["RANK"] == "1", Processes.sum_gradients, 0


def broken(self: Processes, parameters: Any) -> None:
    global sums
    sums += 1
    if what == "gradient" and sums == 2 and is_second:
        parameters[3].grad[0, 0] = float("nan")
    plain(self, parameters)


def break_loss(trainer: Any) -> None:
    plain_loss, broken_before = trainer.compute_loss, False

    def broken_loss(*args: Any, **options: Any) -> Any:
        nonlocal broken_before
        loss = plain_loss(*args, **options)
        if sums != 1 or not is_second or broken_before:
            return loss
        broken_before = True
        return loss * float("nan")

    trainer.compute_loss = broken_loss


Processes.sum_gradients = broken  # type: ignore[method-assign]
if what == "loss":
    break_loss(trl.RewardTrainer)
    break_loss(transformers.Trainer)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
