"""A page that is being served, as tests see it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.chat.comparison import ChatComparison


@dataclass
class Served:
    """A page that is being served.

    Attributes:
        url: of the page.
        app: the FastAPI application.
        comparison: what it stands on.
        votes: the file its votes go to.
    """

    url: str
    app: Any
    comparison: ChatComparison
    votes: Path

    def waits_until_idle(self) -> bool:
        """Return whether nothing is being answered, now or soon."""
        return eventually(lambda: self.comparison.under_way == 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the models back inside the block: whoever is answered gets no further."""
        with self.comparison._model_in_use:
            yield


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Return whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
