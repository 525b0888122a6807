"""Results kept by what they depend on, so that an evaluation repeats nothing and an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_rlhf.run import write_text


class ResultCache:
    """A folder with a JSON file per result, named after the digest of its key.

    Args:
        folder: made when the first result is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result that is kept under `key`, or what `make` returns, which is then kept.

        Args:
            key: all that the result depends on, JSON-able: fingerprints of models, prompts, settings.
            make: returns something JSON-able; what is returned went through JSON either way.
        """
        text = json.dumps(key, sort_keys=True)
        file = self.folder / f"{key.get('what', 'result')}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["key"] == json.loads(text) and held["sha256"] == _digest(held["result"]):
                return held["result"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # not kept yet, or damaged: made again
        result = json.loads(json.dumps(make()))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key, "result": result, "sha256": _digest(result)}))
        return result


def _digest(result: Any) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()
