"""How much memory this process may still take: of a card under its cap, of main memory under its control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

MEMBERSHIP, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Linux: which control groups this process is in, and where their limits are read."""


def free_bytes(device: torch.device) -> float:
    """Return the bytes that this process may still take on `device`.

    Of a card: what the driver has free or the cap of `torch.cuda.set_per_process_memory_fraction` leaves, whichever is
    less, and what torch's allocator holds without using it. Of main memory: what the system could give without
    swapping or the tightest control group leaves.
    """
    if device.type != "cuda":
        return min(float(psutil.virtual_memory().available), control_group_bytes())
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    cap = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(min(free, cap - held), 0) + held - torch.cuda.memory_allocated(device)


def control_group_bytes() -> float:
    """Return what the control groups of this process leave of main memory; infinity where none has a limit.

    Containers and batch systems limit memory by them, and the kernel ends a process that takes more.
    """
    left = float("inf")
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:  # not Linux
        return left
    for _, controllers, path in memberships:
        if controllers == "":
            mount, limit, usage, reclaimable = MOUNT, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage, reclaimable = (
                MOUNT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )  # fmt: skip
        else:
            continue
        group = Path(path.strip("/"))
        for folder in (mount / group, *(mount / parent for parent in group.parents)):
            try:
                room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not seen from inside a container; or "max": no limit
                continue
            left = min(left, room + int(statistics.get(reclaimable, 0)))  # cached files go before anybody is ended
    return max(left, 0.0)
