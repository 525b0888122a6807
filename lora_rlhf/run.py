"""A run's output directory: its config, what each finished stage left, and the check that it is this run's."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml

from lora_rlhf.checkpoint_folders import check_space, sync
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import (
    BadYaml,
    config_to_mapping,
    differing_fields,
    lasting_fields,
    plain_yaml,
    with_defaults,
)
from lora_rlhf.errors import UserError
from lora_rlhf.terminal import interrupt

LOCK = ".lock"
SPACE_OF_A_STAGE = 64 * 2**20
"""Bytes that must be free on the disk before any stage; merging asks for more."""
_LOCKS: dict[Path, IO[str]] = {}
STAGES = ("base", "reward", "instruct", "ppo", "merge", "compare")
CHECKPOINTS = {"reward": "reward_adapter", "instruct": "instruct_adapter", "ppo": "ppo"}
"""Stage → folder of its checkpoints in `checkpoints/`."""
RESULTS = {
    "reward": "reward_adapter/adapter_model.safetensors",
    "instruct": "instruct_adapter/adapter_model.safetensors",
    "ppo": "policy_adapter/adapter_model.safetensors",
    "merge": "merged/config.json",
}
"""Stage → a file without which it is not finished."""
CONTENTS = (
    "config.yaml", "pairs.json", "summary.json", "metrics.jsonl", "curves.png", "score_scales.json", "samples.json",
    "reward_adapter", "instruct_adapter", "policy_adapter", "policy_snapshots", "value_adapter", "merged", "evaluation",
    "hub", "checkpoints", "skipped", "step_samples.jsonl", "tracking",
)  # fmt: skip
PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "unsloth")


class RunDirectory:
    """The files of one run. A stage is finished when `summary.json` has its seconds, written after all else."""

    def __init__(self, config: RunConfig, writes: bool = True) -> None:
        """Open or begin the run of `config`.

        Args:
            config: of the run.
            writes: whether this process does; of several in one run only the main one.

        Raises:
            UserError: the directory holds another run, is not a directory, or cannot be written.
        """
        self.config = config
        self.path, self.writes = Path(config.output_dir), writes
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock(self / LOCK)
            if config.overwrite_output_dir:
                self._clear()
                interrupt.again = "The same command without overwrite_output_dir goes on from there."
            if self._begun():
                if self._is_changed():
                    self._write_config()
                self._drop_checkpoints()  # a run that ended right before it would have
            else:
                self._write_config()
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"output_dir: {self.path} cannot be written: {reason}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def summary(self) -> dict[str, Any]:
        """What finished stages reported so far."""
        return run_summary(self.path)

    def finished(self, stage: str) -> bool:
        """Return whether `stage` needs no more work: it was finished, and what it left is there."""
        return stage in self.summary.get("seconds", {}) and (self / RESULTS.get(stage, "summary.json")).is_file()

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the block puts into the mapping goes to `summary.json` when the block ends well."""
        if self.writes:
            check_space(self.path, SPACE_OF_A_STAGE, f"the {name} stage")
        started = time.perf_counter()
        results: dict[str, Any] = {}
        yield results
        if not self.writes:
            return
        summary = self.summary
        summary |= results
        summary.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 2)
        summary["versions"] = package_versions()
        write_text(self / "summary.json", json.dumps(summary, indent=1) + "\n")
        self._drop_checkpoints()

    def _drop_checkpoints(self) -> None:
        """Delete those of finished stages, whose results hold all that is in them."""
        for stage in filter(self.finished, CHECKPOINTS):
            shutil.rmtree(self / "checkpoints" / CHECKPOINTS[stage], ignore_errors=True)
        with suppress(OSError):
            (self / "checkpoints").rmdir()  # only where nothing is in it

    def needed(self, name: str, stage: str) -> Path:
        """Return the path of what an earlier stage left; raise `UserError` where it did not."""
        if not (self / name).exists():
            recipe = {"reward": "reward_lora", "instruct": "sft_lora", "ppo": "ppo_lora", "merge": "merge_lora"}[stage]
            config = shlex.quote(str(self / "config.yaml"))
            raise UserError(
                f"{self.path} has no {name}: run `python recipes/{recipe}.py --config {config} "
                f"--output_dir {shlex.quote(str(self.path))}` first, or direct_rlhf_lora.py, which runs every stage"
            )
        return self / name

    def _begun(self) -> bool:
        """Return whether anything but the config is here; a run that failed before that may be corrected freely."""
        return any((self / name).exists() for name in CONTENTS if name != "config.yaml")

    def _clear(self) -> None:
        if any(file.name != LOCK for file in self.path.iterdir()) and not (self / "config.yaml").is_file():
            raise UserError(f"output_dir: {self.path} has files but no config.yaml: it is no run, and is left alone")
        for name in CONTENTS:
            if (self / name).is_dir() and not (self / name).is_symlink():
                shutil.rmtree(self / name)
            else:
                (self / name).unlink(missing_ok=True)

    def _write_config(self) -> None:
        text = yaml.safe_dump(config_to_mapping(self.config) | {"overwrite_output_dir": False}, sort_keys=False)
        write_text(self / "config.yaml", text)

    def _is_changed(self) -> bool:
        """Return whether settings of stages that are not finished differ; raise `UserError` where others do."""
        try:
            held = plain_yaml((self / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"output_dir: {self.path} holds results and no config.yaml, which says of what run; put it back, or "
                "choose another --output_dir"
            ) from None
        except (BadYaml, UnicodeDecodeError):
            held = None
        if not isinstance(held, dict):
            raise UserError(f"output_dir: {self / 'config.yaml'} is damaged; choose another --output_dir")
        held, wanted = with_defaults(held, config_to_mapping(RunConfig())), config_to_mapping(self.config)
        kept = list(filter(self.finished, STAGES))
        if fields := differing_fields(lasting_fields(held, kept), lasting_fields(wanted, kept)):
            shown = ", ".join(fields[:5]) + (f" and {len(fields) - 5} more" if len(fields) > 5 else "")
            raise UserError(
                f"output_dir: {self.path} holds another run: it differs in {shown}. "
                f"Choose another --output_dir, start afresh with --overwrite_output_dir, or go on with "
                f"--config {shlex.quote(str(self / 'config.yaml'))} --output_dir {shlex.quote(str(self.path))}"
            )
        return bool(differing_fields(lasting_fields(held, STAGES), lasting_fields(wanted, STAGES)))


def lock(file: Path) -> None:
    """Lock `file` for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: another process has it.
    """
    if file.resolve() in _LOCKS:  # this very process
        return
    held = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.seek(0)
        owner = held.read().strip() or "unknown"
        held.close()
        raise UserError(
            f"output_dir: another run (process {owner}) is at work in {file.parent}: wait for it, or choose another "
            "--output_dir"
        ) from None
    held.truncate(0)
    held.write(f"{os.getpid()}\n")
    held.flush()
    _LOCKS[file.resolve()] = held


def run_summary(folder: Path) -> dict[str, Any]:
    """Return what the finished stages of the run in `folder` reported; raise `UserError` where it is damaged."""
    try:
        held = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        held = None
    if not isinstance(held, dict) or not isinstance(held.get("seconds", {}), dict):
        raise UserError(f"{folder / 'summary.json'} is damaged; delete it to run the stages again")
    return held


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and have it on disk on return."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages a run depends on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
