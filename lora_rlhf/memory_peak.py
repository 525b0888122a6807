"""Peak memory of the work in hand: allocated CUDA memory, or resident memory of this process."""

from __future__ import annotations

import contextlib
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
