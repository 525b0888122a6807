"""Rows that hold no preference data at all: what is wrong with one, and the tally of those that were skipped."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from lora_rlhf.errors import UserError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """What is wrong with a row.

    Attributes:
        reason: what it is counted under.
        detail: the same with the field or the position, for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail or reason


class BadRows:
    """What becomes of bad rows: they are counted by reason, or the first one stops the reading.

    Args:
        skip: count them; else `add` raises.

    Attributes:
        reasons: how many rows were skipped, by reason.
        first: where the first one is and what is wrong with it; none where there was none.
    """

    def __init__(self, skip: bool = False) -> None:
        self._skip = skip
        self.reasons: Counter[str] = Counter()
        self.first: str | None = None

    def add(self, place: str, problem: BadRow) -> None:
        """Take note of a bad row at `place`, written as `FILE, line 7`.

        Raises:
            UserError: bad rows are not to be skipped.
        """
        if not self._skip:
            raise UserError(
                f"dataset_name: {place}: {problem.detail}; correct it, or leave such rows out with --on_bad_rows skip"
            )
        self.reasons[problem.reason] += 1
        self.first = self.first or f"{place}: {problem.detail}"

    def of_one_file(self) -> BadRows:
        """Return an empty tally that treats bad rows alike."""
        return BadRows(self._skip)

    def update(self, others: BadRows) -> None:
        """Add what `others` counted."""
        self.reasons += others.reasons
        self.first = self.first or others.first

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
        return f"{reasons}; the first is {self.first}" if self.first else "none"


def check_row(row: Any) -> dict[str, Any]:
    """Return `row` where it could be a preference pair: `chosen` and `rejected` are there, and text or messages.

    A null is let through: whether an empty field can be used is for the reader of pairs to say.

    Raises:
        BadRow: it could not.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"not an object but {type(row).__name__}")
    if missing := [name for name in ("chosen", "rejected") if name not in row]:
        raise BadRow(
            "without a column",
            f"has no column {' and no column '.join(missing)}; it has {_listed(row)}. "
            "Preference data needs chosen and rejected, and may have prompt",
        )
    for name in ("prompt", "chosen", "rejected"):
        _check_field(name, row.get(name))
    return row


def check_characters(row: dict[str, Any]) -> None:
    """Raise `BadRow` where a text in `row` holds half a surrogate pair, which no tokenizer and no file takes."""
    for name, value in row.items():
        waiting = [name, value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, str):
                if _LONE_SURROGATE.search(part):
                    what = f"field `{shown_name(name)}` holds a lone surrogate, half a character"
                    raise BadRow("with a lone surrogate", what)
            elif isinstance(part, list):
                waiting += part
            elif isinstance(part, dict):
                waiting += [*part, *part.values()]


def shown_name(name: str) -> str:
    """Return the name of a field as it fits into a line of text."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:40]


def _check_field(name: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list):
        raise BadRow("neither text nor messages", f"field `{name}` is {type(value).__name__}, not text or messages")
    for i, message in enumerate(value):
        for part in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(part), str):
                found = type(message.get(part)).__name__ if isinstance(message, dict) and part in message else "missing"
                what = (
                    f"`{name}[{i}].{part}` is {found}" if isinstance(message, dict) else f"`{name}[{i}]` is no message"
                )
                raise BadRow(
                    "neither text nor messages", f"field {what}; a message has a role and a content, both text"
                )


def _listed(row: dict[str, Any]) -> str:
    names = [shown_name(name) for name in sorted(row)]
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "none"
