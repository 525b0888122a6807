"""The page of architectures says what the check finds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

PAGE = ROOT / "docs" / "models.md"
QUICK = ("llama", "opt", "qwen3_moe", "qwen2_5_vl", "gpt2", "lfm2")


def _found(names: tuple[str, ...]) -> dict[str, str]:
    return {name: architectures.checked(name).verdict for name in names}


def test_some_rows_of_the_page_are_what_the_check_finds() -> None:
    written = architectures.verdicts(PAGE.read_text(encoding="utf-8"))
    assert {name: written[name] for name in QUICK} == _found(QUICK)


@pytest.mark.slow
def test_every_row_of_the_page_is_what_the_check_finds() -> None:
    written = architectures.verdicts(PAGE.read_text(encoding="utf-8"))
    assert set(written) == set(architectures.ARCHITECTURES)
    assert written == _found(architectures.ARCHITECTURES)


def test_every_figure_on_the_page_is_below_the_limit() -> None:
    inside = PAGE.read_text(encoding="utf-8").partition(architectures.BEGIN)[2].partition(architectures.END)[0]
    rows = [line.split("|")[4:-1] for line in inside.strip().splitlines()[2:]]
    figures = [float(cell) for row in rows for cell in row if cell.strip()]
    assert len(rows) >= 25 and len(figures) >= 150 and max(figures) <= 1e-4
