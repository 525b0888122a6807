"""The optimizer steps of a TRL trainer, shared by several processes, each of which learns from its own examples."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from lora_rlhf.processes import Processes

SHOWN = ("accuracy", "mean_token_accuracy")
"""Those of TRL's metrics that are logged; of the whole batch, as the loss is."""


def own_examples(before: int, size: int, number: int, batches: int, rank: int, count: int) -> list[int]:
    """Return which examples of a micro-batch a process learns from; maybe none.

    Micro-batches are dealt out whole where every process gets as many; else their examples are, one after another.

    Args:
        before: examples in the micro-batches of this optimizer step before this one.
        size: examples in this one.
        number: of this micro-batch in the step, from 0.
        batches: micro-batches in the step.
        rank: of the process.
        count: of all processes.
    """
    if batches % count == 0:
        return list(range(size)) if number % count == rank else []
    return [i for i in range(size) if (before + i) % count == rank]


class SharedSteps:
    """Makes the steps of a TRL trainer those of all processes together.

    Every process draws the same batches, and takes the loss of its own examples, weighed so that the losses of all
    processes add up to that of the whole batch. Gradients are added up before they are clipped, so that every process
    takes the very same step.

    Args:
        trainer: TRL's, which sees no other process.
        sides: rows of one example in a batch: 2 where the chosen answers come first and then the rejected ones, else 1.
        processes: that share the steps, connected.
    """

    def __init__(self, trainer: Any, sides: int, processes: Processes) -> None:
        self.trainer, self.sides, self.processes = trainer, sides, processes
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.number, self.before = 0, 0  # micro-batches and examples of this step so far
        self.unlogged = 0  # micro-batches since the last log
        self.metrics: defaultdict[str, float] = defaultdict(float)  # sums over those micro-batches
        self.whole_loss, self.whole_step, self.whole_log = trainer.compute_loss, trainer.training_step, trainer.log
        trainer.compute_loss, trainer.training_step, trainer.log = self._loss, self._training_step, self._log

    def _loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this process's share of a micro-batch's loss."""
        size = len(inputs["input_ids"]) // self.sides
        batches = self.trainer.current_gradient_accumulation_steps
        own = own_examples(self.before, size, self.number, batches, self.processes.rank, self.processes.count)
        self.number, self.before, self.unlogged = self.number + 1, self.before + size, self.unlogged + 1
        if not own:
            return torch.zeros((), device=inputs["input_ids"].device, requires_grad=True)
        rows = [side * size + i for side in range(self.sides) for i in own]
        part = {name: value[rows] for name, value in inputs.items()}
        share = _items(part) / _items(inputs)
        loss = self.whole_loss(model, part, return_outputs, num_items_in_batch=num_items_in_batch)
        for name in SHOWN:
            if values := self.trainer._metrics["train"].get(name):
                self.metrics[name] += share * values[-1]
        # a sum over the own tokens by the number of all is a share already
        return loss if num_items_in_batch is not None else loss * share

    def _training_step(self, *args: Any, **rest: Any) -> torch.Tensor:
        loss: torch.Tensor = self.whole_step(*args, **rest)
        if self.trainer.accelerator.sync_gradients:  # the last micro-batch of the step
            self.processes.sum_gradients(self.parameters)
            self.number, self.before = 0, 0
        return loss

    def _log(self, logs: dict[str, float], *rest: Any) -> None:
        """Log the loss and the metrics of the whole batches, in every process."""
        if "loss" in logs:
            shares = {name: total / self.unlogged for name, total in self.metrics.items()}
            found = self.processes.sum_numbers({"loss": logs["loss"], **shares})
            logs["loss"] = found.pop("loss")
            self.trainer._metrics["train"].clear()
            self.trainer._metrics["train"].update({name: [value] for name, value in found.items()})
            self.unlogged = 0
            self.metrics.clear()
        self.whole_log(logs, *rest)


def _items(inputs: dict[str, Any]) -> int:
    """Return over how many items a loss is the mean: answer tokens, or pairs (twice each, chosen and rejected)."""
    return int((inputs["labels"] != -100).sum()) if "labels" in inputs else len(inputs["input_ids"])
