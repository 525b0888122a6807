"""Raw rows of a preference data set: embedded, from the Hub, from a folder (HH's layout too) or from one file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.config import EMBEDDED
from lora_rlhf.errors import UserError

Split = Literal["train", "test"]
SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval")


def dataset_rows(name: str, split: Split) -> list[dict[str, Any]]:
    """Return the rows of one split of a data set.

    Args:
        name: `embedded`, a file, a folder, or a name on the Hub; the last two take `:SUBFOLDER`.
        split: a data set without a held-out part gives every tenth row to `test`, the others to `train`.

    Raises:
        UserError: nothing there, not readable, or neither on this machine nor to be had from the Hub.
    """
    if name == EMBEDDED:
        return _file_rows([Path(__file__).parent / EMBEDDED / f"{split}.jsonl"], name)
    whole, _, part = name.partition(":")
    if Path(name).exists():
        whole, part = name, ""
    path = Path(whole)
    if path.is_file():
        return _tenth(_file_rows([path], name), split, name)
    if path.is_dir():
        return _folder_rows(path, part, split)
    if whole.startswith((".", "/", "~")) or _suffix(path) or whole.count("/") > 1:
        raise UserError(f"dataset_name: no file or folder {whole}")
    return _hub_rows(whole, part, split)


def _folder_rows(folder: Path, part: str, split: Split) -> list[dict[str, Any]]:
    root = folder / part
    if not root.is_dir():
        names = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise UserError(f"dataset_name: {folder} has no folder {part}; it has: {names or 'no folders'}")
    files = sorted(p for p in root.rglob("*") if p.is_file() and _suffix(p))
    if not files:
        raise UserError(f"dataset_name: no {', '.join(SUFFIXES)} below {root}")
    held_out = [p for p in files if p.name.lower().startswith(HELD_OUT_NAMES)]
    training = [p for p in files if p.name.lower().startswith("train")] or [p for p in files if p not in held_out]
    if held_out and training:
        return _file_rows(training if split == "train" else held_out, str(root))
    return _tenth(_file_rows(files, str(root)), split, str(root))


def _file_rows(files: list[Path], name: str) -> list[dict[str, Any]]:
    import datasets

    kinds = {SUFFIXES.get(_suffix(p) or "") for p in files}
    if len(kinds) != 1 or None in kinds:
        raise UserError(f"dataset_name: {name} is not all one of {', '.join(SUFFIXES)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"dataset_name: {file} is empty")
    rows: list[dict[str, Any]] = []
    for file in files:  # one by one, so that an error names the file
        try:
            with _quiet():
                rows += datasets.load_dataset(str(kinds.copy().pop()), data_files=str(file), split="train").to_list()
        except Exception as error:
            cause = error.__cause__ or error
            raise UserError(f"dataset_name: {file} cannot be read: {_first_line(cause)}") from None
    return rows


def _hub_rows(name: str, part: str, split: Split) -> list[dict[str, Any]]:
    import datasets

    try:
        with _quiet():
            splits = datasets.load_dataset(name, data_dir=part or None)
    except Exception as error:
        raise UserError(
            f"dataset_name: {name} is no file or folder here and could not be had from the Hub ({_first_line(error)}). "
            "Check the name and the network, run `hf auth login` for gated data, or give a local folder."
        ) from None
    held_out = next((n for n in splits if n.lower().startswith(HELD_OUT_NAMES)), None)
    training = next((n for n in splits if n.lower().startswith("train")), next(iter(splits)))
    if held_out is None or held_out == training:
        return _tenth(splits[training].to_list(), split, name)
    return splits[training if split == "train" else held_out].to_list()


def _tenth(rows: list[dict[str, Any]], split: Split, name: str) -> list[dict[str, Any]]:
    if split == "test" and len(rows) < 10:
        raise UserError(
            f"dataset_name: {name} has {len(rows)} rows and no held-out ones, too few to set every tenth aside; "
            "give a folder with a train and a test file"
        )
    return [row for i, row in enumerate(rows) if (i % 10 == 9) == (split == "test")]


def _suffix(path: Path) -> str | None:
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
