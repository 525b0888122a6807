"""Votes are on disk when the names are shown, and a crash costs at most the line it tore."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.chat.votes import TIE, append_vote, kept_votes, ties, win_rates
from lora_rlhf.errors import UserError

MODELS = {"base": "b1", "instruct": "i1", "plus": "p1"}


def vote(winner: str, **fields: Any) -> dict[str, Any]:
    return {"winner": winner, "arms": MODELS} | fields


def test_votes_come_back_as_they_were_given(tmp_path: Path) -> None:
    file = tmp_path / "new" / "votes.jsonl"
    given = [vote("plus", text="né\n\ud800"), vote(TIE), vote("base")]
    for one in given:
        append_vote(file, one)
    assert [v["winner"] for v in kept_votes(file)] == ["plus", TIE, "base"]
    assert len(file.read_bytes().splitlines()) == 3


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote("plus"))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    append_vote(file, vote("base"))
    assert [v["winner"] for v in kept_votes(file)] == ["plus", "base"]
    file.write_bytes(b"[]\n{}\n\xff\xfe\nnull\n" + whole + b'{"winner": 3, "arms": {}}\n')
    assert [v["winner"] for v in kept_votes(file)] == ["plus"]


def test_a_vote_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    file = tmp_path / "votes.jsonl"
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (real(handle), synced.append(file.read_bytes())))
    append_vote(file, vote("plus"))
    assert [json.loads(held)["winner"] for held in synced] == ["plus"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"file/votes\.jsonl cannot be written"):
        append_vote(tmp_path / "file" / "votes.jsonl", vote("plus"))
    assert kept_votes(tmp_path / "nowhere.jsonl") == []
    with pytest.raises(UserError, match="--votes: .* cannot be read: Is a directory"):
        kept_votes(tmp_path)


def test_win_rates_count_votes_on_these_models_that_took_a_side() -> None:
    others = {**vote("base"), "arms": {**MODELS, "plus": "p2"}}
    votes = [vote("plus")] * 7 + [vote("base")] * 3 + [vote(TIE)] * 2 + [others] * 5
    rows = {row["arm"]: row for row in win_rates(votes, MODELS)}
    assert {name: (row["wins"], row["votes"]) for name, row in rows.items()} == {
        "base": (3, 10), "instruct": (0, 10), "plus": (7, 10)
    }  # fmt: skip
    assert rows["plus"]["share"] == 0.7
    assert (rows["plus"]["low"], rows["plus"]["high"]) == (
        pytest.approx(0.3968, abs=1e-4),
        pytest.approx(0.8922, abs=1e-4),
    )
    assert ties(votes, MODELS) == 2


def test_no_votes_are_no_share() -> None:
    assert [(row["share"], row["low"], row["high"]) for row in win_rates([], MODELS)] == [(None, 0.0, 1.0)] * 3
