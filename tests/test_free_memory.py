"""What may still be taken: the cap of a card, torch's own store of free blocks, and control groups are minded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lora_rlhf import free_memory, memory
from lora_rlhf.free_memory import control_group_bytes, free_bytes

GIB = 2**30
CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("free", "fraction", "reserved", "allocated", "expected"),
    [
        (20, 1.0, 4, 4, 20),  # all that the driver has
        (20, 1.0, 4, 1, 23),  # and 3 that torch holds unused
        (20, 0.5, 4, 1, 11),  # the cap is 12: 8 more from the driver, and 3 held
        (2, 0.5, 4, 1, 5),  # other processes leave less than the cap does
        (20, 0.125, 4, 1, 3),  # the cap of 3 came after 4 were held: only those
    ],
)
def test_of_a_card_by_hand(
    monkeypatch: pytest.MonkeyPatch, free: float, fraction: float, reserved: int, allocated: int, expected: int
) -> None:
    answers: dict[str, Any] = {
        "mem_get_info": (int(free * GIB), 24 * GIB), "get_per_process_memory_fraction": fraction,
        "memory_reserved": reserved * GIB, "memory_allocated": allocated * GIB,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(CARD) == expected * GIB


def control_group(folder: Path, limit: object, usage: int, cached: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cached}\n")


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control-group file system without limits, for a process in /job/step of version 2."""
    monkeypatch.setattr(free_memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "MOUNT", tmp_path / "mount")
    (tmp_path / "cgroup").write_text("1:cpu:/elsewhere\n0::/job/step\n")
    (tmp_path / "mount").mkdir()
    return tmp_path / "mount"


def test_the_tightest_control_group_above_a_process_counts(mount: Path) -> None:
    assert control_group_bytes() == float("inf")
    control_group(mount / "job" / "step", "max", 5 * GIB, 0)
    assert control_group_bytes() == float("inf")
    control_group(mount / "job", 8 * GIB, 6 * GIB, 1 * GIB)  # 2 free, and 1 of cached files
    assert control_group_bytes() == 3 * GIB
    control_group(mount / "job" / "step", 2 * GIB, 1 * GIB, 0)
    assert control_group_bytes() == 1 * GIB
    control_group(mount / "job" / "step", 1 * GIB, 2 * GIB, 0)  # a limit that was lowered
    assert control_group_bytes() == 0


def test_a_container_sees_its_own_group_at_the_top(mount: Path) -> None:
    """Where it is not in a name space of its own, the path that it is told is not there."""
    control_group(mount, 4 * GIB, 3 * GIB, 0)
    assert control_group_bytes() == 1 * GIB


def test_version_1_has_other_names(mount: Path) -> None:
    free_memory.MEMBERSHIP.write_text("9:name=systemd:/\n4:hugetlb,memory:/docker/abc\n0::/\n")
    control_group(mount / "memory" / "docker" / "abc", 4 * GIB, 3 * GIB, GIB // 2, version=1)
    control_group(mount / "memory", 2**63 - 4096, 9 * GIB, 0, version=1)  # its word for no limit
    assert control_group_bytes() == 1.5 * GIB


def test_no_control_groups_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(free_memory, "MEMBERSHIP", tmp_path / "none")
    assert control_group_bytes() == float("inf")


def test_the_planner_minds_the_limit(mount: Path) -> None:
    own = psutil.Process().memory_info().rss
    control_group(mount / "job", 8 * GIB, 7 * GIB, 0)
    usable, on_cuda = memory.usable_bytes()
    assert usable - own == pytest.approx(1 * GIB, abs=64 * 2**20) and not on_cuda
    assert free_bytes(torch.device("cpu")) == 1 * GIB


@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="needs Linux")
def test_of_this_machine_there_is_some_and_no_more_than_it_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
