"""Torn, damaged and unreadable files, and rows that have no lines: named by file and row in both modes."""

from __future__ import annotations

import gzip
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from bad_files import GOOD, line, refused, skipped, with_bad
from preference_rows import row

from lora_rlhf.data import row_files
from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.errors import UserError

# Torn and damaged files


def test_a_torn_gzip_file_gives_its_whole_lines_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    rows = [row(f"question {i} {os.urandom(40).hex()}") for i in range(200)]
    whole = gzip.compress(b"".join(map(line, rows)))
    file = tmp_path / "pairs.jsonl.gz"
    for share in (0.3, 0.7, 0.95):
        file.write_bytes(whole[: int(len(whole) * share)])
        refused(file, "line ", "the gzip stream is torn here")
        bad_rows = BadRows(skip=True)
        kept = row_files.file_rows(file, bad_rows)
        assert kept == rows[: len(kept)]
        assert 0.8 * share * len(rows) < len(kept) < len(rows)
        assert bad_rows.reasons == Counter({"where the gzip stream is torn": 1})
        assert f"{file}, line {len(kept) + 1}: the gzip stream is torn here" in str(bad_rows)


@pytest.mark.parametrize("skip", [False, True])
def test_a_gzip_file_that_fails_its_checksum_is_refused_whole(tmp_path: Path, skip: bool) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    content = bytearray(gzip.compress(b"".join(map(line, GOOD))))
    content[-6] ^= 1
    file.write_bytes(content)
    refused(file, "no whole gzip file", "CRC", skip=skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pairs.jsonl", b"", "is empty"),
        ("pairs.jsonl.gz", gzip.compress(b""), "no row that can be used"),
        ("pairs.jsonl.gz", b"", "is empty"),
        ("pairs.json", b" \n", "no row that can be used"),
        ("pairs.json", json.dumps(GOOD).encode()[:-9], "cannot be read as a JSON list: not JSON"),
        ("pairs.json.gz", gzip.compress(json.dumps(GOOD).encode())[:-20], "torn gzip file"),
        ("pairs.parquet", b"PAR1" + bytes(50) + b"PAR1", "cannot be read after row 0"),
        ("pairs.parquet", b"", "is empty"),
    ],
)
def test_a_file_with_nothing_to_save_is_an_error_in_both_modes(
    tmp_path: Path, name: str, content: bytes, words: str, skip: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words, skip=skip)


# Rows that have no lines


def test_a_bad_row_of_a_json_list_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([*GOOD, row("Q") | {"chosen": 1.5}, 7]))
    refused(file, f"{file}, row 5: field `chosen` is float")
    rows, bad_rows = skipped(file)
    assert rows == GOOD
    assert bad_rows.reasons == Counter({"neither text nor messages": 1, "not an object": 1})


def test_a_json_file_of_lines_is_read_by_lines(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_bytes(with_bad(b"{\n"))
    refused(tmp_path / "pairs.json", "line 3")
    assert skipped(tmp_path / "pairs.json")[0] == GOOD


def test_a_json_list_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_LIST", 50)
    (tmp_path / "pairs.json").write_text(json.dumps(GOOD))
    refused(tmp_path / "pairs.json", "write it as .jsonl")


def test_a_parquet_file_of_other_columns_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list([{"chosen": 1, "rejected": 2}, {"chosen": 3, "rejected": 4}]).to_parquet(file)
    refused(file, f"{file}, row 1: field `chosen` is int")
    datasets.Dataset.from_list([{"instruction": "Q", "output": "A"}]).to_parquet(file)
    refused(file, f"{file}, row 1: has no column chosen and no column rejected; it has instruction, output")


def test_a_parquet_text_that_is_not_utf_8_is_named_by_its_row(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    texts = pyarrow.array([b"A", b"A\xff", b"A"]).cast(pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Q"] * 3, "chosen": broken, "rejected": ["B"] * 3}), file)
    refused(file, f"{file}, row 2: field `chosen` is not UTF-8")
    rows, bad_rows = skipped(file)
    assert rows == [row("Q", "A", "B")] * 2
    assert bad_rows.reasons == Counter({"not UTF-8": 1})


def test_a_bad_row_on_the_hub_is_named_by_split_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "assistant", "content": "A"}]
    rows = [
        {"prompt": "Q", "chosen": m, "rejected": "B"} for m in (messages, [{"role": None, "content": "A"}], messages)
    ]
    splits = datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list(rows), "test_prefs": None})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir=None: splits)
    refused("some/pairs", "some/pairs, split train_prefs, row 2: field `chosen[0].role` is NoneType")
    kept, bad_rows = skipped("some/pairs")
    assert kept == [rows[0], rows[2]]
    assert bad_rows.reasons.total() == 1


def test_every_tenth_good_row_is_held_out_whatever_was_skipped(tmp_path: Path) -> None:
    rows = [row(f"question {i}") for i in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"".join(b"{\n" + line(r) for r in rows))
    bad_rows = BadRows(skip=True)
    assert dataset_rows(str(file), "test", bad_rows) == [rows[9], rows[19]]
    assert bad_rows.reasons.total() == 20


# Files and folders that may not be read


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user without rights inside the block."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "folder", "inner", "above"])
def test_what_may_not_be_read_is_named(what: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        top.chmod(0o755)
        file = top / "data" / "inner" / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_bytes(line(GOOD[0]))
        closed = {"file": file, "folder": top / "data", "inner": file.parent, "above": file.parent}[what]
        closed.chmod(0)
        name = file if what in ("file", "above") else top / "data"
        try:
            with nobody():
                refused(name, str(closed), "Permission denied")
        finally:
            closed.chmod(stat.S_IRWXU)


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(line(GOOD[0]))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    for skip in (False, True):
        refused(file, "cannot be read: Input/output error", skip=skip)


@pytest.mark.parametrize("name", ["x" * 5000, "/tmp/" + "y" * 300 + ".jsonl"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    refused(name, "dataset_name")


def test_a_file_has_no_parts(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(line(GOOD[0]))
    with pytest.raises(UserError, match="is a file and has no part helpful"):
        dataset_rows(f"{tmp_path / 'pairs.jsonl'}:helpful", "train")
