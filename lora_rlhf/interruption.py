"""Ctrl-C and SIGTERM: the first asks a run to finish its step and save, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from lora_rlhf.terminal import interrupt, note

ONE_REQUEST = 3.0
"""Seconds in which another SIGTERM is the same request: services and launchers tell a process each by themselves."""


class Interruption:
    """Whether the user, or the system, has asked the run to end."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.asked_at = 0.0

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Take a signal."""
        if self.asked is not None:
            if number == signal.SIGTERM and time.monotonic() - self.asked_at < ONE_REQUEST:
                return
            raise KeyboardInterrupt
        self.asked, self.asked_at = signal.Signals(number).name, time.monotonic()
        note(f"  {self.asked}: this step is finished and saved first; once more ends the run now")


class StoppedAfterSaving(KeyboardInterrupt):
    """The run ends because it was asked to; the text says how far it came."""

    def __init__(self, stage: str, step: int, saved: bool) -> None:
        super().__init__(f"after {stage} step {step}" + ("" if saved else ", which could not be saved"))


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Take Ctrl-C and SIGTERM inside the block; the block looks at `asked` where it can stop."""
    interrupt.mind()
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield found
        return
    before: dict[int, Any] = {number: signal.signal(number, found) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
