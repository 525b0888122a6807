"""Where a run's numbers go besides its own files: TensorBoard, Weights & Biases or Trackio, through accelerate.

A tracker never stops a run: when it fails, that is said once and the run goes on without it. After a resume it goes on
where it was and shows no step twice. What it needs for that, and TensorBoard's and wandb's files, is in the run's
`tracking` folder.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.run import write_text
from lora_rlhf.terminal import note

FOLDER = "tracking"
PROJECT = "lora_rlhf"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""What `report_to` can name besides `none`, and the packages of which one is needed for it."""
NETWORK_SECONDS = 30
"""Longest wait for the network, when wandb begins and when it ends."""


def tracker(report_to: str, run: Path, config: RunConfig) -> Tracker:
    """Return the tracker that `report_to` names; it begins with the first step that it is given.

    Args:
        report_to: none, tensorboard, wandb or trackio.
        run: the run's directory.
        config: the whole config, which is shown beside the numbers.

    Raises:
        UserError: another name, a package that is not installed, or no login at wandb.
    """
    check_tracker(report_to)
    return Tracker(report_to, run, config)


def check_tracker(report_to: str) -> None:
    """Raise `UserError` for another name, a package that is not installed, or no login at wandb."""
    if report_to == "none":
        return
    if report_to not in PACKAGES:
        raise UserError(f"report_to is one of none, {', '.join(PACKAGES)}, not {report_to!r}")
    if not any(importlib.util.find_spec(package) for package in PACKAGES[report_to]):
        raise UserError(f"report_to: {report_to} is not installed: pip install {report_to}, or set it to none")
    if report_to == "wandb":
        _check_login()


class Tracker:
    """Numbers and sample answers of PPO steps on their way to one of the trackers, or to none."""

    def __init__(self, name: str, run: Path, config: RunConfig) -> None:
        self.name = name
        self._run = run
        self._config = config
        self._backend: Any = None
        self._dropped = name == "none"
        self._id, self._last_step = _identity(run / FOLDER / f"{name}.json")
        self._sent_before = self._last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of a PPO step, each under `ppo/`."""

        def send() -> None:
            numbers = {key: value for key, value in metrics.items() if key != "step" and isinstance(value, int | float)}
            self._backend.log({f"ppo/{key}": float(value) for key, value in numbers.items()}, step=step)
            self._last_step = step
            held = {"id": self._id, "step": step}
            write_text(self._run / FOLDER / f"{self.name}.json", json.dumps(held) + "\n")

        self._try(step, send)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send sample answers of a PPO step, after its numbers: rows that all have the same columns."""
        if rows:
            columns = list(rows[0])
            self._try(step, lambda: self._send_table(step, columns, [[row[c] for c in columns] for row in rows]))

    def close(self) -> None:
        """Send what is left; waits for the network, but not long."""
        if self._backend is not None and not self._dropped:
            self._try(max(self._last_step, self._sent_before + 1), self._backend.finish)
        self._dropped = True

    def _try(self, step: int, send: Callable[[], None]) -> None:
        # wandb and Trackio would show a step twice or refuse it; TensorBoard takes what comes later
        if self._dropped or (self.name != "tensorboard" and step <= self._sent_before):
            return
        try:
            if self._backend is None:
                self._backend = self._started(step)
            send()
        except Exception as error:
            self._dropped = True
            said = " ".join(str(error).split()) or type(error).__name__
            note(f"  tracking: {self.name} failed at step {step} ({said}); the run goes on without it")

    def _started(self, step: int) -> Any:
        """Return accelerate's tracker, going on with `step`."""
        from accelerate.state import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        PartialState()  # accelerate's trackers log through it
        folder, mapping = self._run / FOLDER, config_to_mapping(self._config)
        folder.mkdir(parents=True, exist_ok=True)
        if self.name == "tensorboard":
            backend = TensorBoardTracker("", logging_dir=folder, purge_step=step)
            backend.start()
            if step == 1:
                text = yaml.safe_dump(mapping, sort_keys=False)
                backend.log({"config": "".join(f"    {line}\n" for line in text.splitlines())}, step=0)
            note(f"  tracking: tensorboard --logdir {folder}")
        elif self.name == "wandb":
            # `offline` runs are files in the folder; the output of the run stays out of them, and of the net
            settings = {"console": "off", "silent": True}
            settings |= {"init_timeout": NETWORK_SECONDS, "finish_timeout": NETWORK_SECONDS}
            backend = WandBTracker(
                os.environ.get("WANDB_PROJECT", PROJECT), id=self._id, name=self._run.resolve().name,
                resume="allow", dir=str(folder), config=mapping, settings=settings,
            )  # fmt: skip
            backend.start()
            where = f"wandb sync {folder}/wandb/offline-run-*" if backend.tracker.offline else backend.tracker.url
            note(f"  tracking: {where}")
        else:
            name = f"{self._run.resolve().name}-{self._id}"
            backend = TrackioTracker(PROJECT, name=name, resume="allow", config=mapping)
            backend.start()
            note(f"  tracking: trackio show --project {PROJECT}, run {name}")
        return backend

    def _send_table(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        if self.name == "tensorboard":
            lines = [columns, ["---"] * len(columns), *([_markdown_cell(cell) for cell in row] for row in data)]
            text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            self._backend.log({"samples": text}, step=step)
        elif self.name == "wandb":
            self._backend.log_table("samples", columns=columns, data=data, step=step)
        else:
            table = importlib.import_module("trackio").Table(columns=columns, data=data)
            self._backend.log({"samples": table}, step=step)


def _identity(file: Path) -> tuple[str, int]:
    """Return the id under which a run is tracked and the last step sent; a new id where there is none."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return str(held["id"]), int(held["step"])
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return uuid.uuid4().hex[:8], 0


def _check_login() -> None:
    """Raise `UserError` where wandb would have to ask for a key in the middle of the run."""
    wandb = importlib.import_module("wandb")
    offline = wandb.setup().settings.mode not in ("online", "shared")
    if not offline and not wandb.login(prompt=False, verify=False):
        raise UserError("report_to: wandb has no login: run `wandb login`, or set WANDB_MODE=offline to keep it here")


def _markdown_cell(value: Any) -> str:
    text = f"{value:+.2f}" if isinstance(value, float) else html.escape(str(value))
    return text.replace("|", "&#124;").replace("\n", "<br>")
