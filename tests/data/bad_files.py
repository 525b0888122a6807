"""Files of preference data with something wrong in them, and how they are refused or read all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preference_rows import Row, row

from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.errors import UserError

GOOD = [row(f"question {i}", f"good {i}", f"bad {i}") for i in range(4)]


def line(value: Any, **options: Any) -> bytes:
    return json.dumps(value, **options).encode() + b"\n"


def with_bad(bad: bytes) -> bytes:
    """A file whose third line is bad."""
    return b"".join(map(line, GOOD[:2])) + bad + b"".join(map(line, GOOD[2:]))


def refused(name: Path | str, *words: str, skip: bool = False) -> str:
    with pytest.raises(UserError) as error:
        dataset_rows(str(name), "train", BadRows(skip))
    text = str(error.value)
    assert "\n" not in text
    for word in (str(name), *words):
        assert word in text
    return text


def skipped(name: Path | str) -> tuple[list[Row], BadRows]:
    bad_rows = BadRows(skip=True)
    return dataset_rows(str(name), "train", bad_rows), bad_rows
