"""Fuzzed preference data: each row that comes back is one that was there, and each that does not is counted."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from fuzz_inputs import EDITS, Bench, Target, edited, filled_lines, garbage, is_subsequence, lines_of, outcome
from hypothesis import strategies as st

from lora_rlhf.config import RunConfig
from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.data.row_files import file_rows
from lora_rlhf.errors import UserError

ROWS = [{"prompt": f"q{i} é\u2028", "chosen": f"good {i}", "rejected": [{"role": "assistant", "content": f"b{i}"}]}
        for i in range(6)]  # fmt: skip
JSONL, GZIPPED = lines_of(ROWS), gzip.compress(lines_of(ROWS * 20), mtime=0)


def both_modes(path: Path) -> tuple[list[Any] | UserError, list[Any] | UserError, BadRows]:
    bad_rows = BadRows(skip=True)
    return outcome(lambda: file_rows(path, BadRows())), outcome(lambda: file_rows(path, bad_rows)), bad_rows


def data_bytes(bench: Bench, case: Any) -> None:
    content = edited(JSONL, case)
    strict, lenient, bad_rows = both_modes(bench.file("pairs.jsonl", content))
    lines = filled_lines(content)
    whole = [row for line, row in zip(JSONL.splitlines(), ROWS, strict=True) if line in lines]
    if isinstance(lenient, UserError):
        assert isinstance(strict, UserError)
        assert not whole or "UTF-16" in str(lenient)
        return
    assert len(lenient) + bad_rows.reasons.total() == len(lines)
    readable = [json.loads(line.decode(errors="replace")) for line in lines if _is_json(line)]
    assert is_subsequence(lenient, readable)
    assert all(row in lenient for row in whole)
    assert isinstance(strict, UserError) == bool(bad_rows.first)
    if not isinstance(strict, UserError):
        assert strict == lenient
    elif lenient:
        assert f"line {_number(strict)}: " in str(bad_rows.first)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _number(error: UserError) -> int:
    return int(str(error).partition(", line ")[2].partition(":")[0])


def gzip_bytes(bench: Bench, case: Any) -> None:
    strict, lenient, bad_rows = both_modes(bench.file("pairs.jsonl.gz", edited(GZIPPED, case)))
    if not isinstance(strict, UserError):
        assert strict == lenient == ROWS * 20
    elif not isinstance(lenient, UserError):
        assert bad_rows.first
        assert "torn" in str(strict) or "torn" in str(bad_rows)
        if {kind for kind, *_ in case} == {"cut"}:  # of other damage, a stream without its end keeps no proof
            assert lenient == (ROWS * 20)[: len(lenient)]


def json_list_bytes(bench: Bench, case: Any) -> None:
    strict, lenient, bad_rows = both_modes(bench.file("pairs.json", edited(json.dumps(ROWS).encode(), case)))
    if not isinstance(strict, UserError):
        assert strict == lenient
        assert not bad_rows.first


def _parquet() -> bytes:
    table = pyarrow.table({name: [str(row[name]) for row in ROWS * 5] for name in ROWS[0]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


PARQUET = _parquet()
PARQUET_ROWS = [{name: str(value) for name, value in row.items()} for row in ROWS * 5]


def parquet_bytes(bench: Bench, case: Any) -> None:
    strict, lenient, bad_rows = both_modes(bench.file("pairs.parquet", edited(PARQUET, case)))
    for found in (strict, lenient):
        if not isinstance(found, UserError):
            assert bad_rows.first or len(found) == len(PARQUET_ROWS)
            for row in found:
                assert {row["chosen"], row["rejected"]} <= {v for r in PARQUET_ROWS for v in r.values()}


def data_shape(bench: Bench, rows: list[Any]) -> None:
    bench.folder.joinpath("set").mkdir(exist_ok=True)
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    for name, part in (("train", [*rows, good]), ("test", [good])):
        bench.file(f"set/{name}.jsonl", lines_of(part))
    config = RunConfig(dataset_name=[str(bench.folder / "set")], on_bad_rows="skip")
    pairs, report = preference_pairs(config, bench.tokenizer, "train")
    assert len(pairs) == report.kept >= 1
    assert report.kept + report.left_out.total() == report.read == len(rows) + 1
    strict = outcome(
        lambda: preference_pairs(dataclasses.replace(config, on_bad_rows="error"), bench.tokenizer, "train")
    )
    assert isinstance(strict, UserError) == (report.first_bad is not None)


ROW = st.fixed_dictionaries(
    {}, optional={name: garbage("role", "content") for name in ("prompt", "chosen", "rejected", "other")}
)
TARGETS: dict[str, Target] = {
    "JSON lines: bytes": (EDITS, data_bytes),
    "gzip: bytes": (EDITS, gzip_bytes),
    "JSON list: bytes": (EDITS, json_list_bytes),
    "Parquet: bytes": (EDITS, parquet_bytes),
    "rows: shape": (st.lists(ROW | garbage("chosen", "rejected"), max_size=4), data_shape),
}
