"""Be one of two processes that talk to each other, and print as JSON what comes of it: see test_two_workers.py."""

from __future__ import annotations

import json

import torch
from accelerate import PartialState

from lora_rlhf import processes
from lora_rlhf.processes import Processes

processes.BUCKET_BYTES = 32
together = Processes()
mine = together.rank + 1.0
together.meet()
found: dict[str, object] = {}

with together.connected(), together.alone():
    found["seen by libraries"] = PartialState().num_processes
    shapes = {"both, 24 bytes": (2, 3), "second alone, 8 bytes": (2,), "nobody": (4,), "both, 40 bytes": (10,)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for name, parameter in parameters.items():
        if name.startswith("both") or (name.startswith("second") and together.rank == 1):
            parameter.grad = torch.full_like(parameter, mine)
    places = {name: p.grad.data_ptr() for name, p in parameters.items() if p.grad is not None}
    together.sum_gradients(list(parameters.values()))
    found["gradients"] = {n: None if p.grad is None else p.grad.unique().tolist() for n, p in parameters.items()}
    found["in place"] = all(parameters[n].grad.data_ptr() == place for n, place in places.items())  # type: ignore[union-attr]

    rows = together.rows(5)
    part = {"texts": list("abcde")[rows], "numbers": torch.arange(10.0).view(5, 2)[rows]}
    found["whole"] = {name: list(map(str, value)) for name, value in together.whole(part, 5).items()}
    numbers = {"sum": mine, "largest": mine} | ({"second alone": 7.0} if together.rank == 1 else {})
    found["numbers"] = together.sum_numbers(numbers, largest=("largest",))

with together.connected():  # a new group, of the same store
    found["again"] = [together.any(together.rank == 1), together.from_main(mine), together.first(f"of {mine}")]
print(json.dumps(found))
