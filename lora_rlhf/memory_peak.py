"""Peak memory of the work in hand: allocated CUDA memory, or resident memory of this process; giving it back, and
knowing when it ran out.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import re
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


OUT_OF_MEMORY = re.compile(
    r"""DefaultCPUAllocator | std::bad_alloc | Cannot\ allocate\ memory      # main memory; a mapping of a file
    | \b(CUDA|HIP)\ out\ of\ memory                                       # torch's own allocator, quoted by others
    | \b(CUDA|HIP)(\ driver)?\ error:\ out\ of\ memory                     # what CUDA itself could not allocate
    | Triton\ Error\ \[(CUDA|HIP)\]:\ out\ of\ memory
    | \b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED
    | CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED          # of cuDNN 9
    | Failed\ to\ CUDA\ (calloc|malloc) | Cuda\ failure\ (\d+\ )?'out\ of\ memory'  # NCCL
    | NVML_SUCCESS\ ==\ r\ INTERNAL\ ASSERT\ FAILED.*CUDACachingAllocator  # while torch words its own error
    """,
    re.VERBOSE,
)
"""How torch and what it calls say that memory ran out, where they have no class of error for it."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, says that memory ran out: a card's or main memory.

    Torch has a class for what its own CUDA allocator lacks and for nothing else; the rest are told by their words.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        texts = [str(link), *getattr(link, "__notes__", ())] if isinstance(link, RuntimeError) else []
        if any(OUT_OF_MEMORY.search(text) for text in texts):
            return True
        link = link.__cause__
    return False


def device_answers() -> bool:
    """Return whether CUDA can still be used after an error; always true where it is not used.

    Memory that ran out leaves CUDA as it was. Other errors, which the same moment may bring to light, leave the
    process unable to use the card: every later call fails with the same error.
    """
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
