"""Batch sizes that change memory and not the result, and that shrink for good where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import return_freed_memory
from lora_rlhf.terminal import note

Result = TypeVar("Result")


class BatchSizes:
    """The three batch sizes of a PPO step, by the names of their settings."""

    def __init__(self, settings: PpoSettings) -> None:
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
            UserError: memory runs out at size 1.
        """
        while True:
            size = self.sizes[name]
            try:
                return work(size)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"out of memory with ppo.{name} 1; `python -m lora_rlhf.memory` shows what takes it, "
                        "and what to change"
                    ) from error
            # out here the traceback no longer holds what was computed
            self.sizes[name] = size // 2
            return_freed_memory()
            note(f"  out of memory: ppo.{name} is {size // 2} from here on, and the step goes on with the same numbers")
