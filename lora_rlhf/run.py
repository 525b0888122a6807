"""A run's output directory: its config, what each finished stage left, and the check that it is this run's."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import BadYaml, config_to_mapping, differing_fields, plain_yaml
from lora_rlhf.errors import UserError

STAGES = ("base", "reward", "instruct", "ppo", "merge", "compare")
CONTENTS = (
    "config.yaml", "summary.json", "metrics.jsonl", "curves.png", "score_scales.json", "samples.json",
    "reward_adapter", "instruct_adapter", "policy_adapter", "policy_snapshots", "value_adapter", "merged", "evaluation",
    "hub",
)  # fmt: skip
PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "unsloth")


class RunDirectory:
    """The files of one run. A stage is finished when `summary.json` has its seconds, written after all else."""

    def __init__(self, config: RunConfig) -> None:
        """Open or begin the run of `config`.

        Raises:
            UserError: the directory holds another run, is not a directory, or cannot be written.
        """
        self.config = config
        self.path = Path(config.output_dir)
        wanted = {k: v for k, v in config_to_mapping(config).items() if k not in ("output_dir", "overwrite_output_dir")}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if config.overwrite_output_dir:
                self._clear()
            if (self / "config.yaml").is_file() and self._begun():
                self._check_same_run(wanted)
            else:
                text = yaml.safe_dump(config_to_mapping(config) | {"overwrite_output_dir": False}, sort_keys=False)
                write_text(self / "config.yaml", text)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def summary(self) -> dict[str, Any]:
        """What finished stages reported so far."""
        return run_summary(self.path)

    def finished(self, stage: str) -> bool:
        """Return whether `stage` needs no more work."""
        return stage in self.summary.get("seconds", {})

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the block puts into the mapping goes to `summary.json` when the block ends well."""
        started = time.perf_counter()
        results: dict[str, Any] = {}
        yield results
        summary = self.summary
        summary |= results
        summary.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 2)
        summary["versions"] = package_versions()
        write_text(self / "summary.json", json.dumps(summary, indent=1) + "\n")

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
        if any(self.path.iterdir()) and not (self / "config.yaml").is_file():
            raise UserError(f"output_dir: {self.path} has files but no config.yaml: it is no run, and is left alone")
        for name in CONTENTS:
            if (self / name).is_dir() and not (self / name).is_symlink():
                shutil.rmtree(self / name)
            else:
                (self / name).unlink(missing_ok=True)

    def _check_same_run(self, wanted: dict[str, Any]) -> None:
        try:
            held = plain_yaml((self / "config.yaml").read_text(encoding="utf-8"))
        except (BadYaml, UnicodeDecodeError):
            held = None
        if not isinstance(held, dict):
            raise UserError(f"output_dir: {self / 'config.yaml'} is damaged; choose another --output_dir")
        held = {k: v for k, v in held.items() if k not in ("output_dir", "overwrite_output_dir")}
        if fields := differing_fields(held, wanted):
            shown = ", ".join(fields[:5]) + (f" and {len(fields) - 5} more" if len(fields) > 5 else "")
            raise UserError(
                f"output_dir: {self.path} holds another run: it differs in {shown}. "
                f"Choose another --output_dir, start afresh with --overwrite_output_dir, or go on with "
                f"--config {self / 'config.yaml'}"
            )


def run_summary(folder: Path) -> dict[str, Any]:
    """Return what the finished stages of the run in `folder` reported; raise `UserError` where it is damaged."""
    try:
        held = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # no JSON, or no UTF-8
        held = None
    if not isinstance(held, dict) or not isinstance(held.get("seconds", {}), dict):
        raise UserError(f"{folder / 'summary.json'} is damaged; delete it to run the stages again")
    return held


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages a run depends on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
