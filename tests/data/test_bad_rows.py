"""Rows that hold no preference data: named by file, line and field, or skipped and counted; the others stay whole."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_files import GOOD, line, refused, skipped, with_bad
from hypothesis import given
from hypothesis import strategies as st
from preference_rows import Row, questions, row
from recipe_runs import assert_one_line_of_error

from lora_rlhf.config import RunConfig
from lora_rlhf.data import row_files
from lora_rlhf.data.bad_rows import BadRow, BadRows, check_row
from lora_rlhf.data.preferences import UnusableRow, pair_from_row, preference_pairs
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.errors import UserError

BAD_LINES = {
    "cut off": (b'{"prompt": "Q", "chosen": "A", "rej\n', "not JSON", ["column"]),
    "no JSON": (b"prompt,chosen,rejected\n", "not JSON", ["Expecting value at column 1"]),
    "two rows": (line(GOOD[0])[:-1] + line(GOOD[1]), "not JSON", ["Extra data"]),
    "not UTF-8": (line(GOOD[0]).replace(b"good", b"g\xffd"), "not UTF-8", ["byte"]),
    "zero bytes": (b"\x00" * 64 + b"\n", "not JSON", []),
    "deep": (b'{"chosen": ' + b"[" * 100_000 + b"\n", "not JSON", []),
    "digits": (b'{"chosen": "A", "rejected": "B", "score": ' + b"9" * 9_000 + b"}\n", "not JSON", []),
    "list": (line(["Q", "A", "B"]), "not an object", ["not an object but list"]),
    "null": (line(None), "not an object", ["not an object but NoneType"]),
    "no rejected": (line({"prompt": "Q", "chosen": "A"}), "without a column", ["has no column rejected; it has ch"]),
    "number": (line(row("Q") | {"chosen": 3}), "neither text nor messages", ["field `chosen` is int"]),
    "object": (line(row("Q") | {"prompt": {"text": "Q"}}), "neither text nor messages", ["field `prompt` is dict"]),
    "no message": (line(row("Q") | {"rejected": ["B"]}), "neither text nor messages", ["`rejected[0]` is no mes"]),
    "no content": (
        line(row("Q") | {"chosen": [{"role": "assistant"}]}), "neither text nor messages",
        ["field `chosen[0].content` is missing"],
    ),
    "number of a role": (
        line(row("Q") | {"prompt": [{"role": 1, "content": "Q"}]}), "neither text nor messages",
        ["field `prompt[0].role` is int"],
    ),
    "lone surrogate": (
        b'{"prompt": "Q", "chosen": "A \\uD83D.", "rejected": "B"}\n', "with a lone surrogate", ["field `chosen`"],
    ),
    "lone surrogate in a name": (
        b'{"prompt": "Q", "chosen": "A", "rejected": "B", "\\udc00": 1}\n', "with a lone surrogate", ["\\udc00"],
    ),
    "twice": (
        b'{"prompt": "Q", "chosen": "A", "rejected": "B", "chosen": "C"}\n', "with a field that is there twice",
        ["field `chosen` is there twice"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named_by_file_line_and_field_or_skipped(tmp_path: Path, suffix: str, kind: str) -> None:
    bad, reason, words = BAD_LINES[kind]
    file = tmp_path / f"pairs.{suffix}"
    file.write_bytes(gzip.compress(with_bad(bad)) if suffix.endswith("gz") else with_bad(bad))
    text = refused(file, f"{file}, line 3: ", "--on_bad_rows skip", *words)
    assert len(text) < 500
    rows, bad_rows = skipped(file)
    assert rows == GOOD
    assert bad_rows.reasons == Counter({reason: 1})
    assert str(bad_rows.first).startswith(f"{file}, line 3: ")


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_file_of_bad_lines_alone_is_an_error_in_both_modes(tmp_path: Path, kind: str) -> None:
    bad, reason, _ = BAD_LINES[kind]
    (tmp_path / "pairs.jsonl").write_bytes(bad * 2)
    refused(tmp_path / "pairs.jsonl", "line 1")
    refused(tmp_path / "pairs.jsonl", "no row that can be used", f"2 {reason}", "line 1", skip=True)


def test_nothing_good_in_one_file_of_several_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "train-1.jsonl").write_bytes(b"".join(map(line, GOOD)))
    (tmp_path / "train-2.jsonl").write_bytes(b"{\n")
    (tmp_path / "test.jsonl").write_bytes(line(GOOD[0]))
    with pytest.raises(UserError, match=r"train-2\.jsonl has no row that can be used"):
        dataset_rows(str(tmp_path), "train", BadRows(skip=True))


# What is no fault of a row


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: b"\xef\xbb\xbf" + content, id="byte-order mark"),
        pytest.param(lambda content: content.replace(b"\n", b"\r\n"), id="Windows line ends"),
        pytest.param(lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"), id="both"),
        pytest.param(lambda content: content.replace(b"\n", b"\n\xef\xbb\xbf", 1), id="byte-order mark inside"),
        pytest.param(lambda content: content.replace(b"\n", b"\n \t\r\n\n"), id="empty lines"),
        pytest.param(lambda content: content.removesuffix(b"\n"), id="no line end at the end"),
    ],
)
def test_marks_and_line_ends_of_other_systems_are_read_right(
    tmp_path: Path, change: Callable[[bytes], bytes], skip: bool
) -> None:
    rows = [row("What\u2028is\x85it?", 'A "quoted"\n\r\n answer \\ 🌱', "no\x0bno\x1c"), *GOOD]
    content = change(b"".join(line(r, ensure_ascii=False) for r in rows))
    (tmp_path / "pairs.jsonl").write_bytes(content)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("pairs.jsonl", "pairs.jsonl.gz"):
        bad_rows = BadRows(skip)
        assert dataset_rows(str(tmp_path / name), "train", bad_rows) == rows
        assert bad_rows.first is None


def test_utf_16_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes("".join(json.dumps(r) + "\n" for r in GOOD).encode("utf-16"))
    for skip in (False, True):
        refused(tmp_path / "pairs.jsonl", "is UTF-16; save it as UTF-8", skip=skip)


def test_surrogates_in_pairs_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(line(row("Plant?", "🌱")))
    assert b"\\ud83c" in (tmp_path / "pairs.jsonl").read_bytes()
    assert dataset_rows(str(tmp_path / "pairs.jsonl"), "train") == [row("Plant?", "🌱")]


def test_a_row_of_a_megabyte_is_read_and_left_out_for_its_length(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    name = dataset([*GOOD, row("long", "word " * 200_000), row("unbroken", "a" * 1_000_000)])
    config = make_config(dataset_name=[name])
    pairs, report = preference_pairs(config, tokenizer, "train")
    assert len(pairs) == len(GOOD)
    assert report.left_out == Counter({f"over {config.max_length} tokens": 2})
    assert report.first_bad is None


def test_a_line_without_end_is_one_bad_row_and_takes_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(line(GOOD[0]))
        for _ in range(192):
            stream.write(b" " * 2**20)
        stream.write(b"\n" + line(GOOD[1]))
    assert file.stat().st_size < 2**21
    tracemalloc.start()
    rows, bad_rows = skipped(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == GOOD[:2]
    assert bad_rows.reasons == Counter({"too long a line": 1})
    assert peak < 6 * row_files.MAX_LINE
    refused(file, f"{file}, line 2: is over 16 MiB long")


def test_rows_are_streamed_and_not_held_as_text(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"".join(line({"note": "n" * 4000}) for _ in range(5000)) + line(GOOD[0]))
    tracemalloc.start()
    rows, bad_rows = skipped(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows, bad_rows.reasons) == ([GOOD[0]], Counter({"without a column": 5000}))
    assert peak < file.stat().st_size / 10


# The report, and the config that asks for it


def test_the_report_counts_bad_rows_by_reason_and_names_the_first(
    make_config: Callable[..., RunConfig], tokenizer: Any, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(b"".join(map(line, [*GOOD, row("Q", "A", "A")])))
    bad.write_bytes(line(row("own")) + b"{\n" + line({"chosen": 1}) + b"{\n")
    names = [str(good), str(bad)]
    pairs, report = preference_pairs(make_config(dataset_name=names, on_bad_rows="skip"), tokenizer, "train")
    assert sorted(questions(pairs)) == ["own", *(f"question {i}" for i in range(4))]
    assert report.left_out == Counter({"not JSON": 2, "without a column": 1, "chosen equals rejected": 1})
    assert (report.read, report.kept) == (9, 5)
    assert str(report).startswith("5 of 9 rows (left out: 2 not JSON, ")
    assert f"; the first bad row: {bad}, line 2: not JSON" in str(report)
    with pytest.raises(UserError, match=rf"{bad}, line 2: not JSON"):
        preference_pairs(make_config(dataset_name=names), tokenizer, "train")


def test_a_run_on_bad_data_ends_with_one_line_before_any_work(recipe: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(with_bad(line(row("Q") | {"chosen": 3})) * 5)
    options = ["--model_name_or_path", "tiny", "--output_dir", str(tmp_path / "run"), "--dataset_name", str(file)]
    status, printed = recipe("direct_rlhf_lora.py", *options)
    assert_one_line_of_error(status, printed, f"{file}, line 3: field `chosen` is int", "--on_bad_rows skip")
    assert not (tmp_path / "run" / "reward_adapter").exists()


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.just("\n\nHuman: a\n\nAssistant: b"),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), v, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "other"]), JSON))
def test_a_row_that_passes_is_never_of_a_wrong_type_for_the_reader_of_pairs(source: Row) -> None:
    try:
        assert check_row(source) is source
    except BadRow:
        return
    try:
        pair_from_row(source)
    except UnusableRow as reason:
        assert str(reason) != "not text or messages"
