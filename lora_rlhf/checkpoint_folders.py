"""Folders that are there whole or not at all: written beside, synced, renamed, and read back before an older one goes.

A checkpoint is `step_000012/`; its `manifest.json` holds the size and the SHA-256 of every other file in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lora_rlhf.errors import UserError, first_line

MANIFEST = "manifest.json"
BYTES_OF_A_NUMBER = 12
"""That is learned, in a checkpoint: itself and Adam's two moments, in float32."""


def write_checkpoint(parent: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `step` and delete those before the newest `keep`.

    Args:
        parent: folder of the checkpoints.
        step: its number.
        write: fills the folder it is given.
        keep: how many stay, this one among them; at least 1.

    Returns:
        The finished folder.

    Raises:
        UserError: it could not be written, or reads back otherwise than it was written; older ones are as they were.
    """
    folder = parent / f"step_{step:06d}"
    half = parent / f".{folder.name}.part"
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        write(half)
        write_manifest(half)
        if folder.is_dir():
            shutil.rmtree(folder)
        half.rename(folder)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(half, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder} could not be written: {reason}") from None
    if problem := damage(folder):
        raise UserError(f"{folder} reads back otherwise than it was written ({problem}); is the disk failing?")
    for old, path in sorted(step_folders(parent))[: -max(keep, 1)]:
        if old < step:
            shutil.rmtree(path, ignore_errors=True)
    return folder


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` where fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB free, and {what} needs about {needed / 2**20:,.0f}: "
            "make room, and the same command goes on"
        )


def check_space_of_checkpoint(folder: Path, step: int, numbers: int, copied: int = 0) -> None:
    """Raise `UserError` where the disk of `folder` has no room for two checkpoints.

    Args:
        folder: on the disk.
        step: of the checkpoint.
        numbers: that are learned.
        copied: numbers of which a copy in float32 is there too, without moments.
    """
    check_space(folder, 2 * (numbers * BYTES_OF_A_NUMBER + 4 * copied), f"a checkpoint of step {step}")


def write_manifest(folder: Path) -> None:
    """Write the manifest of what `folder` holds, and have all of it on disk on return."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    held = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST, *{path.parent for path in files}, folder):
        sync(path)


def newest_checkpoint(parent: Path, report: Callable[[str], None]) -> tuple[int, Path] | None:
    """Return (step, folder) of the newest checkpoint that is whole; the damaged ones after it are named in `report`."""
    damaged = []
    found = None
    for step, folder in sorted(step_folders(parent), reverse=True):
        problem = damage(folder)
        if problem is None:
            found = step, folder
            break
        damaged.append(f"{folder} is damaged ({problem})")
    instead = "the stage begins anew" if found is None else f"{found[1].name} is used"
    for text in damaged:
        report(f"{text}; {instead}")
    return found


def step_folders(parent: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, folder) of every folder in `parent` that is named for a step, whole or not."""
    for folder in parent.glob("*") if parent.is_dir() else ():
        if (match := re.fullmatch(r"step_(\d+)", folder.name)) and folder.is_dir():
            yield int(match[1]), folder


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, as far as its manifest tells; none: nothing."""
    try:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wanted = {str(name): (facts["size"], facts["sha256"]) for name, facts in held.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    if not wanted:
        return f"its {MANIFEST} is empty"
    for name, (size, digest) in wanted.items():
        file = folder / name
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if sha256(file) != digest:
                return f"{name} has other content than was written"
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            return f"{name}: {getattr(error, 'strerror', None) or error}"
    return None


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a checkpoint's file into words; its manifest fits, so it was written like this."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from lora_rlhf.memory_peak import ran_out  # late: it imports torch, which pushing and watching do without

        if ran_out(error):  # nothing is wrong with the file
            raise
        raise UserError(
            f"{file} cannot be read ({first_line(error)[:200]}): delete {file.parent} to go on from the checkpoint "
            "before it"
        ) from None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk on return."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
