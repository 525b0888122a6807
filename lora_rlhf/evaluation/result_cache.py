"""Results kept by what they depend on, so that an evaluation repeats nothing and an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_rlhf.processes import Processes
from lora_rlhf.run import write_text


class ResultCache:
    """A folder with a JSON file per result, named after the digest of its key.

    Args:
        folder: made when the first result is kept.
        processes: that make results together, and are connected: all of them ask for the same ones in the same order,
            and the first one reads and writes the files. None means this process alone.
    """

    def __init__(self, folder: Path, processes: Processes | None = None) -> None:
        self.folder, self.processes = folder, processes or Processes.one()

    def result(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result that is kept under `key`, or what `make` returns, which is then kept.

        Args:
            key: all that the result depends on, JSON-able: fingerprints of models, prompts, settings.
            make: returns something JSON-able; what is returned went through JSON either way.
        """
        text = json.dumps(key, sort_keys=True)
        file = self.folder / f"{key.get('what', 'result')}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        kept = self.processes.from_main(_kept(file, text) if self.processes.is_main else None)
        if kept is not None:
            return kept["result"]
        result = json.loads(json.dumps(make()))
        if self.processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"key": key, "result": result, "sha256": _digest(result)}))
        return result


def _kept(file: Path, key: str) -> dict[str, Any] | None:
    """Return what `file` holds under `key`; None where it is not kept yet, or damaged: it is made again then."""
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return held if held["key"] == json.loads(key) and held["sha256"] == _digest(held["result"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(result: Any) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()
