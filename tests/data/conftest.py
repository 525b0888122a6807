"""Preference data in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from preference_rows import Row, row


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., str]:
    """Write training rows (and held-out ones) into a folder of its own and return its path."""

    def write(rows: list[Row], held_out: list[Row] | None = None, name: str = "data") -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file, part in (("train", rows), ("test", held_out or [row("held out")])):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
        return str(folder)

    return write
