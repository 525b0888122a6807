"""Checkpoints are there whole or not at all, whatever the disk does."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.checkpoint_folders import (
    MANIFEST,
    check_space,
    damage,
    newest_checkpoint,
    step_folders,
    write_checkpoint,
)
from lora_rlhf.errors import UserError

CONTENT = {"a.bin": b"a" * 5000, "b.json": b"{}", "deep/c.bin": bytes(range(256)) * 40}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def steps(parent: Path) -> list[int]:
    return sorted(step for step, _ in step_folders(parent))


def whole(parent: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = newest_checkpoint(parent, said.append)
    return (None if found is None else found[0]), said


def test_a_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 12, write, 1)
    assert folder == tmp_path / "step_000012"
    assert {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST
    } == CONTENT
    assert damage(folder) is None and whole(tmp_path) == (12, [])


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (0, [4])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 5):
        write_checkpoint(tmp_path, step, write, keep)
    assert steps(tmp_path) == left


def test_the_previous_one_goes_only_when_the_new_one_has_been_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 1, write, 1)
    monkeypatch.setattr("lora_rlhf.checkpoint_folders.damage", lambda folder: "a.bin has other content")
    with pytest.raises(UserError, match=r"step_000002 reads back otherwise .*a\.bin"):
        write_checkpoint(tmp_path, 2, write, 1)
    assert 1 in steps(tmp_path)


def damaged(kind: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        file = folder / "deep" / "c.bin"
        if kind == "torn":
            file.write_bytes(file.read_bytes()[:-7])
        elif kind == "flipped":
            content = bytearray(file.read_bytes())
            content[100] ^= 1
            file.write_bytes(bytes(content))
        elif kind == "missing":
            file.unlink()
        elif kind == "no manifest":
            (folder / MANIFEST).unlink()
        elif kind == "bad manifest":
            (folder / MANIFEST).write_text('{"a.bin": 3}', encoding="utf-8")
        else:
            (folder / MANIFEST).write_text("{}", encoding="utf-8")

    return do


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("torn", "deep/c.bin has 10233 bytes of 10240"), ("flipped", "deep/c.bin has other content"),
        ("missing", "deep/c.bin: No such file"), ("no manifest", "never finished"), ("bad manifest", "cannot be read"),
        ("empty manifest", "is empty"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str, words: str) -> None:
    write_checkpoint(tmp_path, 1, write, 2)
    damaged(kind)(write_checkpoint(tmp_path, 2, write, 2))
    step, said = whole(tmp_path)
    assert step == 1 and len(said) == 1
    assert str(tmp_path / "step_000002") in said[0] and words in said[0]
    write_checkpoint(tmp_path, 2, write, 2)
    assert whole(tmp_path) == (2, [])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert whole(tmp_path / "nowhere") == (None, [])
    (tmp_path / ".step_000003.part").mkdir()
    assert whole(tmp_path) == (None, [])


class FullDisk:
    """A disk that is full from the n-th write on: opening to write, and syncing, count as writes."""

    def __init__(self, writes: int) -> None:
        self.left = writes
        self.real_open, self.real_sync, self.real_rename = builtins.open, os.fsync, os.rename

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if any(letter in mode for letter in "wax+"):
            self.spend()
        return self.real_open(file, mode, *args, **kwargs)

    def fsync(self, handle: int) -> None:
        self.spend()
        self.real_sync(handle)


def test_a_disk_that_fills_at_any_write_costs_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0
    for writes in range(60):
        parent = tmp_path / str(writes)
        write_checkpoint(parent, 1, write, 1)
        with monkeypatch.context() as patch:
            disk = FullDisk(writes)
            patch.setattr("io.open", disk.open)
            patch.setattr(os, "fsync", disk.fsync)
            try:
                write_checkpoint(parent, 2, write, 1)
            except UserError as error:
                failed += 1
                assert "step_000002 could not be written: No space left on device" in str(error)
                assert whole(parent)[0] in (1, 2)
            else:
                assert whole(parent) == (2, [])
                break
        assert not list(parent.glob(".step*"))
    assert failed >= 8
    shutil.rmtree(tmp_path)


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    check_space(tmp_path, 1, "a file")
    with pytest.raises(UserError, match=r"MiB free, and the merged model needs about 1,048,576,000: make room"):
        check_space(tmp_path, 2**40 * 1000, "the merged model")
