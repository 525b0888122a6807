"""Votes of blind comparisons: one JSON line each, on disk before the names are shown, and what they add up to."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.statistics import wilson_interval

TIE = "tie"


def append_vote(file: Path, vote: dict[str, Any]) -> None:
    """Add a line to `file` and have it on disk on return; a line torn by an earlier crash does not spoil it.

    Raises:
        UserError: the file cannot be written.
    """
    line = json.dumps(vote, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as held:
            if held.tell() and not _ends_with_newline(held):
                line = b"\n" + line
            held.write(line)
            held.flush()
            os.fsync(held.fileno())
    except OSError as error:
        raise UserError(f"the vote could not be kept: {file} cannot be written: {error.strerror}") from None


def _ends_with_newline(held: Any) -> bool:
    held.seek(-1, os.SEEK_END)
    return held.read(1) == b"\n"


def kept_votes(file: Path) -> list[dict[str, Any]]:
    """Return the votes in `file`, none where it is not there yet; lines that are no votes are passed over.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--votes: {file} cannot be read: {error.strerror}") from None
    found = []
    for line in lines:
        try:
            vote = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(vote, dict) and isinstance(vote.get("winner"), str) and isinstance(vote.get("arms"), dict):
            found.append(vote)
    return found


def win_rates(votes: Iterable[dict[str, Any]], fingerprints: dict[str, str]) -> list[dict[str, Any]]:
    """Return per arm how often it was voted best among votes that took a side, with Wilson's 95 % interval.

    Only votes on these very models count: those whose `arms` (name → fingerprint) are `fingerprints`.
    """
    counts = Counter(vote["winner"] for vote in votes if vote["arms"] == fingerprints)
    decided = sum(count for winner, count in counts.items() if winner in fingerprints)
    rows = []
    for name in fingerprints:
        low, high = wilson_interval(counts[name], decided) if decided else (0.0, 1.0)
        share = counts[name] / decided if decided else None
        rows.append({"arm": name, "wins": counts[name], "votes": decided, "share": share, "low": low, "high": high})
    return rows


def ties(votes: Sequence[dict[str, Any]], fingerprints: dict[str, str]) -> int:
    """Return how many votes on these models took no side."""
    return sum(vote["winner"] == TIE and vote["arms"] == fingerprints for vote in votes)
