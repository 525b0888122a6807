"""A run as its files show it while it is going on: the stages, the PPO steps, the time left, and what looks wrong."""

from __future__ import annotations

import difflib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.config_file import BadYaml, plain_yaml
from lora_rlhf.errors import UserError
from lora_rlhf.reward.own_reward import trains_own_reward
from lora_rlhf.run import LOCK, STAGES, run_summary
from lora_rlhf.warning_signs import SIGNALS, hacking_signs

State = Literal["done", "running", "waiting", "not needed", "stopped?"]
RECENT = 20
"""Steps whose median seconds predict those to come."""


@dataclass(frozen=True)
class StageState:
    """A stage, how far it is, and its seconds: all of them, or those since the last sign of a stage before it."""

    name: str
    state: State
    seconds: float | None


@dataclass(frozen=True)
class WatchedRun:
    """What the files of a run say at one moment."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    damaged_lines: int
    skipped: Sequence[str]
    stages: Sequence[StageState]
    step_seconds: float | None
    seconds_left: float | None

    @property
    def total_steps(self) -> int | None:
        """The PPO steps that the config asks for; none where it does not say."""
        return _whole_number(_section(self.config, "ppo").get("total_steps"))

    @property
    def taken(self) -> Sequence[Mapping[str, float]]:
        """The metrics of the steps that were not skipped for NaN or infinity."""
        return [metrics for metrics in self.metrics if "skipped" not in metrics]

    @property
    def finished(self) -> bool:
        """Whether every stage that the config needs is done."""
        return all(stage.state in ("done", "not needed") for stage in self.stages)

    def stage_done(self, name: str) -> bool:
        """Return whether the stage `name` is done."""
        return name in self.summary.get("seconds", {})


def read_run(path: Path, now: float | None = None) -> WatchedRun:
    """Return what the files of the run in `path` say.

    Args:
        path: the output directory of a run.
        now: the time, in seconds since the epoch; none: this moment.

    Raises:
        UserError: `path` is no run's directory, or a file of it is damaged.
    """
    now = time.time() if now is None else now
    config = _config(path)
    summary = run_summary(path)
    metrics, damaged = read_metrics(path / "metrics.jsonl")
    step_seconds = _step_seconds(metrics)
    stages = _stages(path, config, summary, step_seconds, now)
    skipped = sorted(file.name for file in (path / "skipped").iterdir()) if (path / "skipped").is_dir() else []
    total = _whole_number(_section(config, "ppo").get("total_steps"))
    left = None
    if total is not None and step_seconds is not None and any(s.name == "ppo" and s.state == "running" for s in stages):
        since = now - (_modified(path / "metrics.jsonl") or now)
        left = max(0.0, (total - metrics[-1]["step"]) * step_seconds - since)
    return WatchedRun(path, config, summary, metrics, damaged, skipped, stages, step_seconds, left)


def read_metrics(file: Path) -> tuple[list[dict[str, float]], int]:
    """Return the PPO steps in a `metrics.jsonl`, and how many whole lines of it cannot be read.

    A last line without its end is still being written and is left for later. A step that comes again, after a resume,
    takes the place of what was there from it on.

    Raises:
        UserError: the file has lines, and none can be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    steps: list[dict[str, float]] = []
    damaged = 0
    for line in lines:
        metrics = _metrics(line)
        if metrics is None:
            damaged += 1
            continue
        while steps and steps[-1]["step"] >= metrics["step"]:
            steps.pop()
        steps.append(metrics)
    if damaged and not steps:
        raise UserError(f"{file} is damaged: line 1 is no JSON object with a step; move it away to watch the run")
    return steps, damaged


def run_warnings(run: WatchedRun) -> list[str]:
    """Return what looks wrong in a run, each with what to do about it."""
    found = []
    if run.damaged_lines:
        found.append(f"metrics.jsonl: {run.damaged_lines} lines cannot be read, and are left out")
    if run.skipped:
        found.append(f"skipped: {len(run.skipped)} in {run.path / 'skipped'}, the last is {run.skipped[-1]}")
    if early := _section(run.summary, "ppo").get("stopped_early"):
        found.append(f"PPO stopped early: {early}")
    if any(stage.state == "stopped?" for stage in run.stages):
        found.append("the run seems to be stopped; the command that started it goes on from there")
    return found + _metric_warnings(run)


def _metric_warnings(run: WatchedRun) -> list[str]:
    if not run.taken:
        return []
    found = []
    last, ppo = run.taken[-1], _section(run.config, "ppo")
    recent = run.taken[-5:]
    if broken := sorted(key for key, value in last.items() if not math.isfinite(value)):
        found.append(f"step {last['step']:.0f}: not a finite number: {', '.join(broken)}")
    kl, limit = last.get("kl", 0.0), ppo.get("max_kl")
    if isinstance(limit, int | float) and kl > 0.8 * limit:
        found.append(
            f"KL {kl:.1f} is near ppo.max_kl ({limit:g}), where PPO stops: raise ppo.kl_coef or lower the rate"
        )
    if kl < -1:
        found.append(f"KL {kl:.1f} is below 0: sampler and trainer may disagree")
    if _mean(recent, "clip_fraction") > 0.3:
        found.append(f"{_mean(recent, 'clip_fraction'):.0%} of ratios are clipped: lower ppo.learning_rate")
    if len(recent) == 5 and _mean(recent, "ended_rate") < 0.5:
        found.append(
            f"only {_mean(recent, 'ended_rate'):.0%} of answers end: raise ppo.missing_eos_penalty or response_length"
        )
    if _mean(recent, "entropy") < 0.1 * run.taken[0].get("entropy", 0.0):
        found.append("entropy fell below a tenth of its start: answers become all alike; raise ppo.kl_coef")
    if _mean(recent, "sampler_kl") > 0.1:
        found.append(f"sampler and trainer differ by {_mean(recent, 'sampler_kl'):.2f} nats per token")
    if all(name in m for m in run.taken for name in SIGNALS):
        found += hacking_signs(run.taken).values()
    return found


def _stages(
    path: Path, config: Mapping[str, Any], summary: Mapping[str, Any], step_seconds: float | None, now: float
) -> list[StageState]:
    """Return the state of every stage; the first one that is neither done nor unneeded is taken to be running."""
    seconds = summary.get("seconds", {})
    states: list[StageState] = []
    running = False
    for name in STAGES:
        if name in seconds:
            took = seconds[name]
            states.append(StageState(name, "done", float(took) if isinstance(took, int | float) else None))
        elif not _is_needed(name, config):
            states.append(StageState(name, "not needed", None))
        elif running:
            states.append(StageState(name, "waiting", None))
        else:
            running = True
            began = _modified(path / "summary.json") or _modified(path / "config.yaml") or now
            stepped = _modified(path / "metrics.jsonl") if name == "ppo" else None
            silent = _owner_is_gone(path)
            silent |= stepped is not None and step_seconds is not None and now - stepped > 5 * step_seconds + 60
            states.append(StageState(name, "stopped?" if silent else "running", max(0.0, now - began)))
    return states


def _owner_is_gone(path: Path) -> bool:
    """Return whether the process that last worked on the run is known to have ended."""
    try:
        owner = int((path / LOCK).read_text(encoding="utf-8"))
        if owner > 0:
            os.kill(owner, 0)  # asks only
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _is_needed(stage: str, config: Mapping[str, Any]) -> bool:
    """Return whether a stage has work: an Instruct model or other rewards that the config names need no training."""
    if stage == "instruct":
        return not config.get("instruct_model_name_or_path")
    sources = _section(config, "ppo").get("reward_sources")
    if stage == "reward" and isinstance(sources, list):
        return trains_own_reward([source for source in sources if isinstance(source, dict)])
    return True


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    try:
        held = plain_yaml(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_run(path)) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (BadYaml, UnicodeDecodeError):
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{file} is damaged; start the run again in another --output_dir")
    return held


def _no_run(path: Path) -> str:
    if path.is_dir():
        inside = sorted(str(p.parent) for p in path.glob("*/config.yaml"))
        hint = f"; there are runs inside: {', '.join(inside[:3])}" if inside else ""
        return f"{path} holds no run: it has no config.yaml{hint}"
    if path.exists():
        return f"{path} is a file; give the output directory of a run"
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"no directory {path}" + (f"; did you mean {path.parent / close[0]}?" if close else "")


def _metrics(line: bytes) -> dict[str, float] | None:
    """Return the numbers in a line of metrics; none where it is no JSON object with a step."""
    try:
        held = json.loads(line)
        numbers = {k: float(v) for k, v in held.items() if isinstance(v, int | float)}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return numbers if math.isfinite(numbers.get("step", math.nan)) else None


def _step_seconds(metrics: Sequence[Mapping[str, float]]) -> float | None:
    sums = [sum(v for k, v in m.items() if k.startswith("seconds_")) for m in metrics[-RECENT:]]
    usable = [seconds for seconds in sums if 0 < seconds < math.inf]
    return statistics.median(usable) if usable else None


def _mean(metrics: Sequence[Mapping[str, float]], key: str) -> float:
    """Return the mean of a metric; not a number, which no limit is crossed by, where a step lacks it."""
    return statistics.fmean(m.get(key, math.nan) for m in metrics)


def _section(held: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = held.get(name)
    return section if isinstance(section, dict) else {}


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None
