"""Peak memory of the work in hand: allocated CUDA memory, or resident memory of this process; and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where the system allows it (CUDA, Linux); else the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak since the last reset, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):  # not Linux
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30


def return_freed_memory() -> None:
    """Give what was freed back to the device or the system, which then counts it as free.

    glibc keeps freed blocks: after loading a model in 4 bits, several times what the model takes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Let glibc give back what it keeps of freed blocks: it takes milliseconds. Nothing where there is another one."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def ran_out(error: BaseException) -> bool:
    """Return whether an error of torch says that memory ran out; it has a class for that of a GPU alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
