"""Run a recipe of several processes, in which the second one's gradient of optimizer step 2 has NaN in it.

accelerate launch … tests/nan_in_the_second.py RECIPE OPTIONS…
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from lora_rlhf.processes import Processes

plain, sums = Processes.sum_gradients, 0


def broken(self: Processes, parameters: Any) -> None:
    global sums
    sums += 1
    if sums == 2 and self.rank == 1:
        parameters[3].grad[0, 0] = float("nan")
    plain(self, parameters)


Processes.sum_gradients = broken  # type: ignore[method-assign]
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
