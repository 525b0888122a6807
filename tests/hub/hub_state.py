"""What the stand-in Hub keeps, and what is ordered to go wrong there."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
TOKEN, READER = "hf_StandInTokenThatMayWrite0001", "hf_StandInTokenThatMayRead00002"
LARGE = (".safetensors", ".png", "tokenizer.json")


@dataclass(frozen=True)
class Fault:
    """What happens to the next requests whose `METHOD /path` holds `where` (a regular expression).

    Attributes:
        where: which requests.
        status: sent in place of an answer.
        headers: sent with it.
        body: sent with it; `{token}` becomes the token that came.
        drop: the connection is reset when half the request was read, or when all was done but nothing said.
        times: how many requests.
        reached: set when the fault happens; then `release` is waited for.
    """

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "as ordered"}'
    drop: Literal["midway", "after"] | None = None
    times: int = 1
    reached: threading.Event | None = None
    release: threading.Event | None = None


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit]
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    @property
    def head(self) -> Commit:
        return self.commits[-1]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def oid_of(path: str, content: bytes) -> str:
    """Return what git calls the content: the SHA-256 of large files, else the SHA-1 of the blob."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return blob_id(content)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listed(path: str, content: bytes) -> dict[str, Any]:
    """Return what a listing with blobs says of a file: in git, a large file is a pointer to its content."""
    if not path.endswith(LARGE):
        return {"size": len(content), "blobId": blob_id(content)}
    oid = oid_of(path, content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
    lfs = {"sha256": oid, "size": len(content), "pointerSize": len(pointer)}
    return {"size": len(content), "blobId": blob_id(pointer), "lfs": lfs}
