"""Raw rows of a preference data set: embedded, from the Hub, from a folder (HH's layout too) or from one file."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.config import EMBEDDED
from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.row_files import SUFFIXES, file_rows, good_rows, suffix
from lora_rlhf.errors import UserError, first_line

Split = Literal["train", "test"]
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval")


def dataset_rows(name: str, split: Split, bad_rows: BadRows | None = None) -> list[dict[str, Any]]:
    """Return the rows of one split of a data set.

    Args:
        name: `embedded`, a file, a folder, or a name on the Hub; the last two take `:SUBFOLDER`.
        split: a data set without a held-out part gives every tenth row to `test`, the others to `train`.
        bad_rows: counts the rows that hold no preference data, or stops at the first; none: stops.

    Raises:
        UserError: nothing there, not readable, or neither on this machine nor to be had from the Hub; a bad row.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    try:
        return _rows(name, split, bad_rows)
    except OSError as error:
        raise UserError(f"dataset_name: {name} cannot be read: {error.strerror or error}") from None


def _rows(name: str, split: Split, bad_rows: BadRows) -> list[dict[str, Any]]:
    if name == EMBEDDED:
        return file_rows(Path(__file__).parent / EMBEDDED / f"{split}.jsonl", bad_rows)
    whole, _, part = name.partition(":")
    if Path(name).exists():
        whole, part = name, ""
    path = Path(whole)
    if path.is_file():
        if part:
            raise UserError(f"dataset_name: {whole} is a file and has no part {part}; name a folder before the colon")
        return _tenth(_files_rows([path], name, bad_rows), split, name)
    if path.is_dir():
        return _folder_rows(path, part, split, bad_rows)
    if whole.startswith((".", "/", "~")) or suffix(path) or whole.count("/") > 1:
        raise UserError(f"dataset_name: no file or folder {whole}")
    return _hub_rows(whole, part, split, bad_rows)


def _folder_rows(folder: Path, part: str, split: Split, bad_rows: BadRows) -> list[dict[str, Any]]:
    root = folder / part
    if not root.is_dir():
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise UserError(f"dataset_name: {folder} has no folder {part}; it has: {names or 'no folders'}")
    files = _data_files(root)
    if not files:
        raise UserError(f"dataset_name: no {', '.join(SUFFIXES)} below {root}")
    held_out = [p for p in files if p.name.lower().startswith(HELD_OUT_NAMES)]
    training = [p for p in files if p.name.lower().startswith("train")] or [p for p in files if p not in held_out]
    if held_out and training:
        return _files_rows(training if split == "train" else held_out, str(root), bad_rows)
    return _tenth(_files_rows(files, str(root), bad_rows), split, str(root))


def _data_files(root: Path) -> list[Path]:
    """Return the data files below `root`, sorted; a folder that may not be read stops here instead of being empty."""

    def refuse(error: OSError) -> None:
        raise UserError(f"dataset_name: folder {error.filename} cannot be read: {error.strerror}")

    found = [Path(folder, file) for folder, _, files in os.walk(root, onerror=refuse) for file in files]
    return sorted(p for p in found if suffix(p) and p.is_file())


def _files_rows(files: list[Path], name: str, bad_rows: BadRows) -> list[dict[str, Any]]:
    if any(suffix(p) is None for p in files) or len({suffix(p) == ".parquet" for p in files}) > 1:
        raise UserError(f"dataset_name: {name} is not all one of {', '.join(SUFFIXES)}")
    return [row for file in files for row in file_rows(file, bad_rows)]


def _hub_rows(name: str, part: str, split: Split, bad_rows: BadRows) -> list[dict[str, Any]]:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as own_readers

    if name in own_readers:  # no data set but a reader of local files; `pandas` would unpickle them
        raise UserError(f"dataset_name: {name} names a reader of files; give the file or the folder itself")
    try:
        with _quiet():
            splits = datasets.load_dataset(name, data_dir=part or None)
    except Exception as error:
        raise UserError(
            f"dataset_name: {name} is no file or folder here and could not be had from the Hub "
            f"({first_line(error)[:300]}). Check the name and the network, run `hf auth login` for gated data, or "
            "give a local folder."
        ) from None
    held_out = next((n for n in splits if n.lower().startswith(HELD_OUT_NAMES)), None)
    training = next((n for n in splits if n.lower().startswith("train")), next(iter(splits)))
    own = training if held_out is None or split == "train" else held_out
    rows = list(good_rows(splits[own].to_list(), f"{name}, split {own}", bad_rows))
    if not rows:
        raise UserError(f"dataset_name: {name} has no row that can be used (skipped: {bad_rows})")
    return _tenth(rows, split, name) if held_out in (None, training) else rows


def _tenth(rows: list[dict[str, Any]], split: Split, name: str) -> list[dict[str, Any]]:
    if split == "test" and len(rows) < 10:
        raise UserError(
            f"dataset_name: {name} has {len(rows)} rows and no held-out ones, too few to set every tenth aside; "
            "give a folder with a train and a test file"
        )
    return [row for i, row in enumerate(rows) if (i % 10 == 9) == (split == "test")]


@contextlib.contextmanager
def _quiet() -> Any:
    """Hold back the progress bars and warnings of `datasets`; ours speak for it."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
