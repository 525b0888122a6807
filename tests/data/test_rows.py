"""Raw rows: where they may come from, how a data set is split, and what the errors say."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_rlhf.data.preferences import UnusableRow, pair_from_row
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.errors import UserError

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf"

Row = dict[str, Any]


def rows_of(prefix: str, count: int) -> list[Row]:
    return [{"prompt": f"{prefix} {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[Row]) -> Path:
    """Write rows in the format that the name of the file says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(rows)))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(lines(rows))
    return path


SUFFIXES = ["jsonl", "jsonl.gz", "json", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_gives_every_tenth_row_to_the_held_out_split(tmp_path: Path, suffix: str) -> None:
    rows = rows_of("row", 25)
    name = str(write(tmp_path / f"pairs.{suffix}", rows))
    assert dataset_rows(name, "test") == [rows[9], rows[19]]
    assert dataset_rows(name, "train") == [row for i, row in enumerate(rows) if i not in (9, 19)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_with_a_held_out_file_keeps_its_own_split(tmp_path: Path, suffix: str) -> None:
    train, test = rows_of("train", 12), rows_of("test", 3)
    write(tmp_path / f"train.{suffix}", train)
    write(tmp_path / f"test.{suffix}", test)
    assert dataset_rows(str(tmp_path), "train") == train
    assert dataset_rows(str(tmp_path), "test") == test


@pytest.mark.parametrize("held_out", ["test", "validation", "valid", "dev", "eval", "Test-00000-of-00001"])
def test_held_out_files_are_known_by_their_names(tmp_path: Path, held_out: str) -> None:
    write(tmp_path / "train-00000-of-00001.jsonl", rows_of("train", 2))
    write(tmp_path / f"{held_out}.jsonl", rows_of("held out", 1))
    assert dataset_rows(str(tmp_path), "train") == rows_of("train", 2)
    assert dataset_rows(str(tmp_path), "test") == rows_of("held out", 1)


def test_a_folder_without_a_held_out_file_gives_every_tenth_row(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows_of("a", 7))
    write(tmp_path / "b.jsonl", rows_of("b", 8))
    rows = rows_of("a", 7) + rows_of("b", 8)
    assert dataset_rows(str(tmp_path), "test") == [rows[9]]
    assert dataset_rows(str(tmp_path), "train") == rows[:9] + rows[10:]


@pytest.fixture
def hh_layout(tmp_path: Path) -> Path:
    """A folder with the layout of HH-RLHF."""
    for part in ("harmless-base", "helpful-base"):
        write(tmp_path / "hh" / part / "train.jsonl.gz", rows_of(f"{part} train", 4))
        write(tmp_path / "hh" / part / "test.jsonl.gz", rows_of(f"{part} test", 2))
    (tmp_path / "hh" / "README.md").write_text("about")
    return tmp_path / "hh"


def test_a_folder_is_read_with_its_subfolders(hh_layout: Path) -> None:
    expected = rows_of("harmless-base train", 4) + rows_of("helpful-base train", 4)
    assert dataset_rows(str(hh_layout), "train") == expected
    assert len(dataset_rows(str(hh_layout), "test")) == 4


def test_name_and_subfolder_pick_a_part(hh_layout: Path) -> None:
    assert dataset_rows(f"{hh_layout}:helpful-base", "train") == rows_of("helpful-base train", 4)
    assert dataset_rows(f"{hh_layout}:helpful-base", "test") == rows_of("helpful-base test", 2)


def test_a_missing_subfolder_is_named_with_those_that_are_there(hh_layout: Path) -> None:
    with pytest.raises(UserError, match="no folder helpful; it has: harmless-base, helpful-base"):
        dataset_rows(f"{hh_layout}:helpful", "train")


def test_a_path_with_a_colon_is_that_path(tmp_path: Path) -> None:
    name = str(write(tmp_path / "a:b.jsonl", rows_of("row", 2)))
    assert dataset_rows(name, "train") == rows_of("row", 2)


def test_rows_of_two_shapes_in_one_file_stay_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"},
    ]
    assert dataset_rows(str(write(tmp_path / "pairs.jsonl", rows)), "train") == rows


def test_the_embedded_pairs_are_read_by_name() -> None:
    train, test = dataset_rows("embedded", "train"), dataset_rows("embedded", "test")
    assert len(train) > len(test) > 0
    assert set(train[0]) >= {"prompt", "chosen", "rejected"}


# What the errors say


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"pairs\.jsonl is empty"):
        dataset_rows(str(tmp_path / "pairs.jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", lines(rows_of("row", 3)) + b'{"chosen": "A", "rejec\n'),
        ("pairs.jsonl", b"not json at all\n"),
        ("pairs.jsonl", b"\xff\xfe\x00\x00\n"),
        ("pairs.jsonl", b"\n\n\n"),
        ("pairs.jsonl", b"[]\n"),
        ("pairs.jsonl", b"1\n2\n"),
        ("pairs.json", b"[{"),
        ("pairs.json", b"[]"),
        ("pairs.jsonl.gz", b"not gzip"),
        ("pairs.jsonl.gz", gzip.compress(lines(rows_of("row", 99)))[:-20]),
        ("pairs.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("pairs.parquet", b"PAR1 but no more"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        dataset_rows(str(tmp_path / name), "train")
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["./away", "/away/from/here", "../away", "pairs.jsonl", "a/b/c", "~/pairs", "x.parquet"]
)
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(UserError, match="no file or folder") as error:
        dataset_rows(name, "train")
    assert name in str(error.value)


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(UserError, match=r"no \.jsonl.*below") as error:
        dataset_rows(str(tmp_path), "train")
    assert str(tmp_path) in str(error.value)


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows_of("a", 2))
    write(tmp_path / "train.parquet", rows_of("b", 2))
    with pytest.raises(UserError, match="not all one of"):
        dataset_rows(str(tmp_path), "train")


def test_a_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("chosen,rejected\na,b\n")
    with pytest.raises(UserError, match="is not all one of"):
        dataset_rows(str(tmp_path / "pairs.csv"), "train")


@pytest.mark.parametrize("name", ["someone/no-such-pairs-at-all", "someone/no-such-pairs-at-all:part", "no-such-pairs"])
def test_a_hub_name_without_network_says_what_to_do(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        dataset_rows(name, "train")
    for words in (name.partition(":")[0], "Check the name and the network", "hf auth login", "local folder"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err


# The Hub, as `datasets` answers


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Let `datasets.load_dataset` answer with the given splits; return the list of its calls."""

    def answer(**splits: list[Row]) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, data_dir: str | None = None) -> datasets.DatasetDict:
            calls.append((name, data_dir))
            return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answer


@pytest.mark.parametrize("held_out", ["test", "validation", "test_prefs"])
def test_a_hub_data_set_keeps_its_own_split(hub: Any, held_out: str) -> None:
    calls = hub(**{held_out: rows_of("held out", 2), "train": rows_of("train", 20)})
    assert dataset_rows("some/pairs", "train") == rows_of("train", 20)
    assert dataset_rows("some/pairs", "test") == rows_of("held out", 2)
    assert calls == [("some/pairs", None)] * 2


def test_a_part_of_a_hub_data_set_is_its_data_dir(hub: Any) -> None:
    calls = hub(train=rows_of("train", 20))
    dataset_rows("Anthropic/hh-rlhf:helpful-base", "train")
    assert calls == [("Anthropic/hh-rlhf", "helpful-base")]


@pytest.mark.parametrize("only", ["train", "test"])
def test_a_hub_data_set_of_one_split_gives_every_tenth_row(hub: Any, only: str) -> None:
    hub(**{only: rows_of("row", 20)})
    assert dataset_rows("some/pairs", "test") == [rows_of("row", 20)[9], rows_of("row", 20)[19]]
    assert len(dataset_rows("some/pairs", "train")) == 18


# Real data, beside the checkout

REASONS = {"dialogues differ before the last turn", "last turn is not the assistant's", "empty prompt", "empty answer",
           "chosen equals rejected"}  # fmt: skip


@pytest.mark.skipif(not HH.is_dir(), reason="no HH-RLHF slice beside the checkout")
@pytest.mark.parametrize(("part", "train", "test"), [("harmless-base", 1418, 300), ("helpful-base", 1342, 300)])
def test_hh_rlhf_is_read_and_nearly_every_row_is_a_pair(part: str, train: int, test: int) -> None:
    name = f"{HH}:{part}"
    counts, several_turns = Counter[str](), 0
    assert [len(dataset_rows(name, split)) for split in ("train", "test")] == [train, test]
    for row in dataset_rows(name, "train"):
        try:
            pair = pair_from_row(row)
        except UnusableRow as reason:
            counts[str(reason)] += 1
            continue
        counts["pair"] += 1
        several_turns += len(pair.prompt) > 1
        texts = [*(content for _, content in pair.prompt), pair.chosen, pair.rejected]
        counts["marker left in a text"] += any("\n\nHuman:" in t or "\n\nAssistant:" in t for t in texts)
    assert counts.pop("marker left in a text") == 0
    assert counts.keys() - {"pair"} <= REASONS
    assert counts["pair"] > 0.98 * train
    assert several_turns > 0.3 * train


@pytest.mark.parametrize("count", [1, 9])
def test_a_file_too_small_to_set_rows_aside_says_so(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "few.jsonl", rows_of("q", count))
    with pytest.raises(UserError, match=f"{count} rows and no held-out ones.*a train and a test file"):
        dataset_rows(str(path), "test")
