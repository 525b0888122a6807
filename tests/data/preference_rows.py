"""Rows of preference data, and what became of them."""

from __future__ import annotations

from typing import Any

from lora_rlhf.data.preferences import PreferencePair

Row = dict[str, Any]


def row(question: str, good: str = "Yes.", bad: str = "No.") -> Row:
    return {"prompt": question, "chosen": good, "rejected": bad}


def questions(pairs: list[PreferencePair]) -> list[str]:
    return [pair.prompt[-1][1] for pair in pairs]
