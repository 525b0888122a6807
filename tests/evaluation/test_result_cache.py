"""Results are kept by what they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rlhf.evaluation.result_cache import ResultCache


def test_a_result_is_made_once_and_again_for_another_key(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(len(made))
        return [*made]

    assert ResultCache(tmp_path / "new").result({"what": "x", "arm": "a"}, make) == [0]
    assert ResultCache(tmp_path / "new").result({"arm": "a", "what": "x"}, make) == [0]
    assert ResultCache(tmp_path / "new").result({"what": "x", "arm": "b"}, make) == [0, 1]


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000, '{"key": {}, "result": 5}', '{"result": 5}'])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cache, key = ResultCache(tmp_path), {"what": "x", "n": 1}
    cache.result(key, lambda: 1)
    (file,) = tmp_path.glob("x-*.json")
    file.write_text(damage)
    assert cache.result(key, lambda: 2) == 2
    assert cache.result(key, lambda: 3) == 2


@pytest.mark.parametrize(("old", "new"), [("1.5", "1.6"), ("kept", "kepd"), ('"sha256"', '"sha255"')])
def test_a_result_that_was_changed_in_its_file_is_made_again(tmp_path: Path, old: str, new: str) -> None:
    cache, key = ResultCache(tmp_path), {"what": "x", "n": 1}
    cache.result(key, lambda: [1.5, "kept"])
    (file,) = tmp_path.glob("x-*.json")
    file.write_text(file.read_text().replace(old, new))
    assert cache.result(key, lambda: "made again") == "made again"


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        ResultCache(tmp_path).result({"n": 1}, lambda: 1 // 0)
    assert ResultCache(tmp_path).result({"n": 1}, lambda: "fine") == "fine"
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]  # nothing half-written beside it


def test_what_is_returned_is_what_the_file_holds(tmp_path: Path) -> None:
    """A first run and a second must not differ, in tuples or in keys that are numbers."""
    cache = ResultCache(tmp_path)
    assert cache.result({}, lambda: {1: (2.5, None)}) == {"1": [2.5, None]} == cache.result({}, dict)
