"""What a judge is and gives back, and the file that keeps its good replies, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lora_rlhf.data.chat import Message
from lora_rlhf.errors import UserError

T = TypeVar("T")

UNPARSEABLE = "unparseable"
COUNTED = (
    "requests",
    "retries",
    "rate limited",
    "time-outs",
    "dropped connections",
    "refused connections",
    "server errors",
    "malformed responses",
    "unparseable verdicts",
    "from file",
)


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What became of one conversation.

    Attributes:
        parsed: the verdict; none where there is none.
        reply: the judge's whole reply, or the last one where none had a verdict; none where no reply came.
        problem: none, `unparseable`, or why no answer came.
    """

    parsed: T | None
    reply: str | None
    problem: str | None


class Judge(Protocol):
    """Whoever answers judging requests.

    Attributes:
        name: recorded in the results.
        counts: what happened so far, by the names in `COUNTED`.
    """

    name: str
    counts: dict[str, int]

    def replies(
        self,
        conversations: Sequence[list[Message]],
        parse: Callable[[str], T | None],
        report: Callable[[int], None] | None = None,
    ) -> list[Verdict[T]]:
        """Return the verdicts in the order of the conversations.

        Args:
            conversations: the requests; equal ones are asked once.
            parse: reads a reply; none where it has no verdict.
            report: told how many different conversations are done.
        """
        ...


class ReplyFile:
    """Replies of a judge on disk, a JSON object with `key` and `reply` per line; each is safe before it counts.

    Lines that a killed run has left half written are passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.known: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"the judge's replies: {path} cannot be read: {error.strerror}") from None
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                row = json.loads(line)
                key, reply = row["key"], row["reply"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(reply, str):
                self.known[key] = reply

    def add(self, key: str, reply: str) -> None:
        """Append one reply and wait until the disk has it.

        Raises:
            UserError: the file cannot be written.
        """
        line = json.dumps({"key": key, "reply": reply}).encode("ascii") + b"\n"
        with self._lock:
            try:
                with self._path.open("ab") as file:
                    file.write(b"\n" * self._torn + line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"the judge's replies: {self._path} cannot be written: {error.strerror}") from None
            self._torn = False
            self.known[key] = reply


def conversation_key(judge: str, conversation: list[Message]) -> str:
    """Return what a judge's reply to a conversation is kept under: the SHA-256 of both, in hex."""
    return hashlib.sha256(json.dumps([judge, conversation], sort_keys=True).encode("ascii")).hexdigest()


def verdict_of(reply: str, parse: Callable[[str], T | None]) -> Verdict[T]:
    """Return the verdict in a reply."""
    parsed = parse(reply)
    return Verdict(parsed, reply, UNPARSEABLE if parsed is None else None)


def verdicts_on_file(
    file: ReplyFile,
    keys: Sequence[str],
    parse: Callable[[str], T | None],
    counts: dict[str, int],
    also_unparseable: bool = False,
) -> dict[str, Verdict[T]]:
    """Return the verdicts that need not be asked for, by key, and count them in `counts`.

    Args:
        file: the replies so far.
        keys: of the conversations.
        parse: reads a reply.
        counts: of the judge.
        also_unparseable: whether a reply without a verdict is the last word; else it is asked for again.
    """
    found = {key: verdict_of(file.known[key], parse) for key in dict.fromkeys(keys) if key in file.known}
    usable = {key: verdict for key, verdict in found.items() if also_unparseable or verdict.parsed is not None}
    counts["from file"] += len(usable)
    return usable
