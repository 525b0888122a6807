"""The rows of one file: JSON lines (gzipped or not), a JSON list, or Parquet; a bad one is named by its place."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lora_rlhf.data.bad_rows import BadRow, BadRows, check_characters, check_row, shown_name
from lora_rlhf.errors import UserError, first_line

SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".parquet")
MAX_LINE = 2**24
"""Bytes of the longest line that is read as a row: beyond, no line end is in sight, or a small gzip file unfolds."""
MAX_LIST = 2**30
"""Bytes of the largest JSON list, which is in memory whole before its first row is."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def suffix(path: Path) -> str | None:
    """Return the suffix under which a file is read; none where it is no data file."""
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def file_rows(path: Path, bad_rows: BadRows) -> list[dict[str, Any]]:
    """Return the good rows of a file.

    Args:
        path: its name says how it is read.
        bad_rows: what becomes of the others.

    Raises:
        UserError: it cannot be read, holds no good row, or a bad one where those are not to be skipped.
    """
    own = bad_rows.of_one_file()
    try:
        if path.stat().st_size == 0:
            raise UserError(f"dataset_name: {path} is empty")
        rows = list(_parquet_rows(path, own) if suffix(path) == ".parquet" else _json_rows(path, own))
    except OSError as error:
        raise UserError(f"dataset_name: {path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"dataset_name: {path} has no row that can be used" + (f": {own}" if own.first else ""))
    bad_rows.update(own)
    return rows


def good_rows(rows: Iterable[Any], where: str, bad_rows: BadRows, before: int = 0) -> Iterator[dict[str, Any]]:
    """Yield those of `rows` that could be preference pairs; the others are rows `before + 1` and on of `where`."""
    for i, row in enumerate(rows, before + 1):
        yield from _kept(partial(_same, row), f"{where}, row {i}", bad_rows)


def _kept(read: Callable[[], Any], place: str, bad_rows: BadRows) -> list[dict[str, Any]]:
    """Return what `read` returns where that could be a preference pair, else nothing."""
    try:
        return [check_row(read())]
    except BadRow as problem:
        bad_rows.add(place, problem)
        return []


def _same(value: Any) -> Any:
    return value


# -- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    with path.open("rb") as raw:
        if raw.read(2) in _UTF16:
            raise UserError(f"dataset_name: {path} is UTF-16; save it as UTF-8")
        raw.seek(0)
        if not path.name.lower().endswith(".gz"):
            yield from _lines_or_list(path, raw, bad_rows)
            return
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield from _lines_or_list(path, unpacked, bad_rows)  # type: ignore[arg-type]
        except (gzip.BadGzipFile, zlib.error) as error:
            # in both modes: what was unpacked before the damage shows may be wrong already
            raise UserError(f"dataset_name: {path} is no whole gzip file ({error}): get it again") from None


def _lines_or_list(path: Path, stream: BinaryIO, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    if ".jsonl" not in (suffix(path) or ""):
        try:
            start = stream.read(4096)
            if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _list_rows(path, start + stream.read(MAX_LIST), bad_rows)
                return
        except EOFError:
            raise UserError(f"dataset_name: {path} is a torn gzip file: get it again") from None
        stream.seek(0)
    number = 1
    while True:
        place = f"{path}, line {number}"
        try:
            line = stream.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                bad_rows.add(place, BadRow("too long a line", f"is over {MAX_LINE >> 20} MiB long"))
            elif line.strip():
                yield from _kept(partial(_parsed, line), place, bad_rows)
        except EOFError:
            bad_rows.add(
                place,
                BadRow(
                    "where the gzip stream is torn", "the gzip stream is torn here, its checksum lost; get it again"
                ),
            )
            return
        number += 1


def _list_rows(path: Path, content: bytes, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    if len(content) > MAX_LIST:
        raise UserError(f"dataset_name: {path} is a JSON list of over {MAX_LIST >> 30} GiB; write it as .jsonl")
    try:
        rows = _parsed(content)
    except BadRow as problem:  # in both modes: nothing says where the next row of a broken list begins
        raise UserError(f"dataset_name: {path} cannot be read as a JSON list: {problem.detail}") from None
    yield from good_rows(rows, str(path), bad_rows)


def _parsed(text: bytes) -> Any:
    """Return the JSON value in a line or a file, without a byte-order mark. Raises `BadRow`."""
    try:
        value = json.loads(text.decode("utf-8-sig").rstrip("\r\n"), object_pairs_hook=_unambiguous)
        if b"\\ud" in text.lower():
            check_characters(value if isinstance(value, dict) else {"row": value})
        return value
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"not UTF-8 text (at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadRow("not JSON", f"not JSON ({error.msg} at {where})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands of brackets
        raise BadRow("not JSON", f"not JSON that can be read ({str(error).splitlines()[0]})") from None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadRow("with a field that is there twice", f"field `{shown_name(twice)}` is there twice")
    return held


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    yield from _kept(partial(_arrow_row, batch, i), f"{path}, row {number}", bad_rows)
    except UserError:
        raise
    except Exception as error:  # whatever pyarrow finds broken: in both modes, since rows are not apart in the file
        raise UserError(f"dataset_name: {path} cannot be read after row {number}: {first_line(error)[:300]}") from None


def _arrow_row(batch: Any, i: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            row[name] = column[i].as_py()
    except UnicodeDecodeError:
        raise BadRow("not UTF-8", f"field `{shown_name(name)}` is not UTF-8 text") from None
    return row
