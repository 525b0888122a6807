"""What the parts share: the card, its memory cap, the time that is left, and the sizes of what is run."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shapes import Rates

from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.errors import first_line
from lora_rlhf.memory import GIB
from lora_rlhf.memory_peak import device_answers, peak_memory_gib, return_freed_memory
from lora_rlhf.memory_plan import CONTEXT_BYTES

Figures = dict[str, Any]
Part = Callable[["Bench"], Iterator[tuple[str, Figures]]]
NO_CARD = "needs a CUDA device"


class DeviceLost(RuntimeError):
    """An error of CUDA after which this process cannot use the device any more; the text is that error's."""


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        name: of the size.
        hidden: width of the model.
        layers: its depth.
        vocabulary: rows of its embedding.
        inner: width of its MLP.
        heads: attention heads and key-value heads.
        step: PPO fields laid over the config's own; empty to run the config as it is.
        prompt: longest prompt in tokens; None for the config's own.
        decoded: rows, context and tokens of the decoding benchmark.
        matmul: side of the square matrices whose product is timed.
        copied: bytes that are copied from device memory to device memory.
        check: width, depth, MLP width and heads of the smaller model that correctness is checked on.
    """

    name: str
    hidden: int
    layers: int
    vocabulary: int
    inner: int
    heads: tuple[int, int]
    step: dict[str, Any]
    prompt: int | None
    decoded: tuple[int, int, int]
    matmul: int
    copied: int
    check: tuple[int, int, int, tuple[int, int]]


_TINY_STEP = {
    "batch_size": 4, "micro_batch_size": 2, "scoring_batch_size": 2, "rollout_batch_size": 4, "response_length": 6,
}  # fmt: skip
_SIZES = (
    Size("mistral", 4096, 32, 32000, 14336, (32, 8), {}, None, (64, 384, 24), 8192, 2**31, (1024, 4, 3584, (8, 2))),
    Size(
        "tiny", 64, 2, 600, 128, (4, 2),
        _TINY_STEP, 24, (2, 12, 4), 256, 2**20, (64, 2, 128, (4, 2)),
    ),
)  # fmt: skip
SIZES = {size.name: size for size in _SIZES}
"""Mistral-7B's own shape, and one that a CPU runs in seconds."""


def allocator_gib(card_gib: float) -> float:
    """Return what a card of `card_gib` leaves to torch's allocator beside CUDA's own memory."""
    return card_gib - CONTEXT_BYTES / GIB


@dataclass
class Bench:
    """The run of the benchmark.

    Attributes:
        size: of what is run.
        device: where it runs.
        cap_gib: size of the smaller card that the device stands for; None for its own.
        deadline: `time.monotonic()` after which nothing more begins.
        folder: for files that are not kept.
        peer_path: folder with TRL 1.12, unpacked or as a wheel.
        gguf_parts: files that, joined, are the embedded model's GGUF.
        measured_rates: what the device does at best; None until `rates` is asked for.
    """

    size: Size
    device: torch.device
    cap_gib: float | None
    deadline: float
    folder: Path
    peer_path: Path | None = None
    gguf_parts: list[Path] = field(default_factory=list)
    measured_rates: Rates | None = None

    @property
    def on_card(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the random models."""
        from card_parts.models import whole_vocabulary_tokenizer

        return whole_vocabulary_tokenizer(self.size.vocabulary)

    @cached_property
    def pairs(self) -> list[PreferencePair]:
        """The embedded preference pairs that are short enough in tokens of the random models."""
        return preference_pairs(RunConfig(dataset_name=["embedded"]), self.tokenizer, "train")[0]

    @property
    def rates(self) -> Rates:
        """The measured limits of the device; measured where no part has asked for them before."""
        if self.measured_rates is None:
            from card_parts.limits import measured_limits

            self.measured_rates = measured_limits(self)
        return self.measured_rates

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.on_card:
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], object], repeats: int = 1, rounds: int = 3) -> float:
        """Return the seconds that `work` takes: the median of some rounds of repeats, after one that warms up."""
        work()
        took = []
        for _ in range(rounds):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            self.synchronize()
            took.append((time.perf_counter() - started) / repeats)
        return median(took)

    def peaks_gib(self) -> Figures:
        """Return the peaks since the last reset: what torch's tensors took, and what its allocator held for them."""
        peaks = {"allocated_gib": peak_memory_gib(self.device)}
        if self.on_card:
            peaks["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        return peaks

    @contextlib.contextmanager
    def held_to(self, gib: float | None) -> Iterator[None]:
        """Refuse memory inside the block that a card of `gib` would not have; None for no limit.

        CUDA's own memory, which torch does not count, is taken off: such a card holds that too.
        """
        with self.allocator_held_to(None if gib is None else allocator_gib(gib)):
            yield

    @contextlib.contextmanager
    def allocator_held_to(self, gib: float | None) -> Iterator[None]:
        """Refuse torch's allocator more than `gib` inside the block; None for no limit."""
        if not self.on_card:
            yield
            return
        whole = torch.cuda.get_device_properties(self.device).total_memory / GIB
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        return_freed_memory()  # what the allocator holds already would count
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib or whole) / whole), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def attempt(self, work: Callable[[], Figures], seconds: float = 0.0) -> Figures:
        """Return the figures of `work`, or why there are none: running out of memory is a result too.

        Args:
            work: measures.
            seconds: that it is expected to take; it is skipped where less is left.

        Raises:
            DeviceLost: the device cannot be used any more.
        """
        if seconds > self.seconds_left:
            return {"skipped": f"takes about {seconds:.0f} s, and {max(0, self.seconds_left):.0f} s are left"}
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {first_line(error)}"
        if not device_answers():
            raise DeviceLost(said)
        return_freed_memory()  # out here no traceback holds what was computed
        return {"error": said[:500]}
