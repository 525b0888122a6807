"""Run a recipe that kills itself by SIGKILL when it touches a file of its output directory for the nth time in a stage.

    python tests/killed_at.py OUTPUT_DIR STAGE:N RECIPE OPTIONS…
    python tests/killed_at.py OUTPUT_DIR never RECIPE OPTIONS…     # counts, into OUTPUT_DIR.touched

Between two touches nothing changes on the disk: these are all the moments at which a kill can leave something else.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"}


def main() -> None:
    folder, kill_at = sys.argv[1:3]
    sys.argv = sys.argv[3:]
    touched: Counter[str] = Counter()

    def stage() -> str:
        try:
            finished = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))["seconds"]
        except (OSError, ValueError, KeyError):
            finished = {}
        return ("base", "reward", "instruct", "ppo", "merge", "compare", "end")[len(finished)]

    looking = False

    def touch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal looking
        if looking or event not in CHANGES or not any(str(word).startswith(folder) for word in arguments):
            return
        looking = True
        now = stage()
        looking = False
        touched[now] += 1
        if kill_at == f"{now}:{touched[now]}":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        del touched["end"]
        Path(f"{folder}.touched").write_text(json.dumps(touched), encoding="utf-8")


if __name__ == "__main__":
    main()
