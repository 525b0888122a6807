"""Bad inputs for fuzzing: files with bytes changed, JSON of the wrong shape; and what bounds and judges one try."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from lora_rlhf.base.shared import SharedBase
from lora_rlhf.errors import UserError

Target = tuple[st.SearchStrategy[Any], Callable[["Bench", Any], None]]
"""What is tried, and what checks one try."""


@dataclass
class Bench:
    """What the readers under test work on: a folder, a base, a tokenizer, and the files of a sound adapter."""

    folder: Path
    base: SharedBase
    tokenizer: Any
    adapter: dict[str, bytes]
    parameters: int

    def file(self, name: str, content: bytes) -> Path:
        """Write a file and return its path."""
        (self.folder / name).write_bytes(content)
        return self.folder / name


SNIPPETS = [
    b"\xff", b"\x00", b"\n", b"\r\n", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"\\n",
    b"NaN", b"-1", b"1e999", b"null", b"true", b"9" * 5000, b"[" * 5000, b"\xe2\x80\xa8", b"&a ", b"*a",
    b"!!python/name:os.system ",
]  # fmt: skip
"""What readers of text trip over."""

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "copy", "flip"]),
        st.integers(0, 2**20),
        st.sampled_from(SNIPPETS) | st.binary(min_size=1, max_size=8),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, edits: list[tuple[str, int, bytes, int]]) -> bytes:
    """Return `content` after edits (kind, position, bytes, length); positions wrap around."""
    for kind, position, new, length in edits:
        at = position % (len(content) + 1)
        before, after = content[:at], content[at:]
        if kind == "set":
            after = new + after[len(new) :]
        elif kind == "insert":
            after = new + after
        elif kind == "delete":
            after = after[length:]
        elif kind == "cut":
            after = b""
        elif kind == "copy":
            after = after[:length] + after
        elif after:
            after = bytes([after[0] ^ 1 << length % 8]) + after[1:]
        content = before + after
    return content


def garbage(*names: str) -> st.SearchStrategy[Any]:
    """JSON-able values of any shape, with `names` among the keys."""
    keys = st.sampled_from(names) | st.text(max_size=4)
    scalars = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6)
        | st.sampled_from([*names, "", "\ud800", "é\u2028", 10**400, -1, 0, "#### 4", "\n\nHuman: a\n\nAssistant: b"])
    )  # fmt: skip
    return st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4), max_leaves=12
    )


def lines_of(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def filled_lines(content: bytes) -> list[bytes]:
    """The lines of a JSONL file that hold something."""
    parts = [line.strip().removeprefix(b"\xef\xbb\xbf").strip() for line in content.split(b"\n")]
    return [line for line in parts if line]


class Hang(BaseException):
    """A try took too long; no `except Exception` of the code under test holds it back."""


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise `Hang` where the block takes longer."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or its `UserError`, whose text must be one readable line; all else comes through."""
    try:
        return read()
    except UserError as error:
        text = str(error)
        assert text.strip()
        assert len(text.splitlines()) == 1, text
        assert len(text) < 1500, text
        return error


def is_subsequence(part: list[Any], whole: list[Any]) -> bool:
    """Whether `part` is left when some of `whole` is taken out."""
    rest = iter(whole)
    return all(any(one == other for other in rest) for one in part)
