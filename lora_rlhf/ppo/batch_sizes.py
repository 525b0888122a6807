"""Batch sizes that change memory and not the result, and that shrink for good where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import device_answers, ran_out, return_freed_memory
from lora_rlhf.terminal import note

Result = TypeVar("Result")


class BatchSizes:
    """The three batch sizes of a PPO step, by the names of their settings.

    Args:
        settings: where they start.
        relief: frees memory that the run can do without, and returns whether there was any; it is asked first.
    """

    def __init__(self, settings: PpoSettings, relief: Callable[[], bool] = lambda: False) -> None:
        self.relief = relief
        self.sizes = {
            "rollout_batch_size": min(settings.rollout_batch_size or settings.batch_size, settings.batch_size),
            "scoring_batch_size": min(settings.scoring_batch_size, settings.batch_size),
            "micro_batch_size": min(settings.micro_batch_size, settings.batch_size // settings.num_mini_batches),
        }

    def within_memory(self, name: str, work: Callable[[int], Result]) -> Result:
        """Return `work(size)`; where memory runs out, halve the size and do the same work again.

        Args:
            name: of the size.
            work: must come to the same result whatever the size, and however often it was begun.

        Raises:
            UserError: memory runs out at size 1, or the card can no longer be used.
        """
        while True:
            size = self.sizes[name]
            try:
                return work(size)
            except Exception as error:
                if not ran_out(error):
                    raise
            # out here no traceback holds what was computed
            if not device_answers():
                raise UserError(
                    f"out of memory with ppo.{name} {size}, and CUDA gives no answer since: this process has to be "
                    f"started again. The same command goes on from the last checkpoint; a smaller ppo.{name} needs less"
                )
            if self.relief():
                note("  out of memory: from here on without the 16-bit working copy, which is slower")
            elif size == 1:
                raise UserError(
                    f"out of memory with ppo.{name} 1; `python -m lora_rlhf.memory` shows what takes it, "
                    "and what to change"
                )
            else:
                self.sizes[name] = size // 2
                note(f"  out of memory: from here on ppo.{name} is {size // 2}; the step is the same")
            return_freed_memory()
