"""The steps of a run's PPO stage: metrics, checkpoints, kept policies and sample answers on the way, and its end."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.base.shared import POLICY
from lora_rlhf.checkpoint_folders import (
    check_space_of_checkpoint,
    newest_checkpoint,
    readable,
    step_folders,
    write_checkpoint,
)
from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.interruption import StoppedAfterSaving, interruption
from lora_rlhf.ppo.checkpoint import METRICS, read_state, restore_trainer, write_trainer
from lora_rlhf.ppo.losses import AdaptiveKl
from lora_rlhf.ppo.trainer import Metrics, PpoTrainer
from lora_rlhf.run import RunDirectory, write_text
from lora_rlhf.step_samples import StepSamples, append_samples, drop_samples_from, step_samples_table
from lora_rlhf.terminal import console, note, progress, step_heading, step_line
from lora_rlhf.tracking import Tracker, tracker
from lora_rlhf.warning_signs import hacking_signs

LEAST_REACH = 3.0
"""Factor by which an adaptive KL coefficient should be able to change in a run."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from: its folder, and the numbers in it."""

    folder: Path
    numbers: dict[str, Any]


def checkpoint_to_resume(run: RunDirectory, config: RunConfig) -> Resumed | None:
    """Return the newest whole checkpoint of the PPO stage, or none.

    Raises:
        UserError: it is of another config.
    """
    found = newest_checkpoint(run / "checkpoints" / "ppo", lambda text: note(f"  {text}"))
    return None if found is None else Resumed(found[1], read_state(found[1], config))


def taken_steps(trainer: PpoTrainer, run: RunDirectory, resumed: Resumed | None) -> list[Metrics]:
    """Take the steps that are left, with a live line each in the terminal and one in `metrics.jsonl`.

    Args:
        trainer: newly made; with the scales of `resumed`.
        run: where everything is written.
        resumed: what to go on from.

    Returns:
        The metrics of all steps, those before the interruption among them.

    Raises:
        StoppedAfterSaving: Ctrl-C or SIGTERM; a checkpoint of the last step is written.
        UserError: too many steps in a row were skipped.
    """
    metrics: list[Metrics] = []
    if resumed is not None:
        restore_trainer(trainer, resumed.numbers, resumed.folder)
        with readable(resumed.folder / METRICS):
            text = (resumed.folder / METRICS).read_text(encoding="utf-8")
            metrics = [dict(json.loads(line)) for line in text.splitlines()]
        if run.writes:
            write_text(run / METRICS, text)
        note(f"  going on after step {trainer.step_count}, from {resumed.folder}")
    elif slow := slow_controller(run.config.ppo):
        note(f"  {slow}")
    config, total = run.config, run.config.ppo.total_steps
    kept_steps = {round(total * (i + 1) / (config.ppo.snapshots + 1)) for i in range(config.ppo.snapshots)} - {0, total}
    saved, warned = time.monotonic(), set(hacking_signs(without_skipped(metrics)))
    mode = "w" if resumed is None else "a"
    if run.writes:
        drop_samples_from(run.path, trainer.step_count + 1)
    if run.writes and resumed is None:  # of steps that may have had other settings
        shutil.rmtree(run / "policy_snapshots", ignore_errors=True)
        for old in (run / "skipped").glob("step_*.json"):
            old.unlink()
    with (
        contextlib.closing(tracker(config.report_to if run.writes else "none", run.path, config)) as tracked,
        interruption() as asked,
        (run / METRICS if run.writes else Path(os.devnull)).open(mode, encoding="utf-8") as file,
        progress("ppo: steps", total) as report,
    ):
        console.print(step_heading(), soft_wrap=True)
        while trainer.step_count < total and not trainer.stopped_early:
            try:
                metrics.append(trainer.step())
            except UserError:
                _write_skipped(trainer, run)
                raise
            _write_line(file, metrics[-1])
            tracked.log(trainer.step_count, metrics[-1])
            report(trainer.step_count)
            if "skipped" in metrics[-1]:
                _write_skipped(trainer, run)
                note(f"  step {trainer.step_count} is skipped: {trainer.skip_reason}")
            else:
                console.print(step_line(metrics[-1]), soft_wrap=True)
            if config.sample_steps and trainer.step_count % config.sample_steps == 0 and run.writes:
                _show_samples(trainer, run, tracked)
            for kind, text in hacking_signs(without_skipped(metrics)).items():
                if kind not in warned:
                    warned.add(kind)
                    note(f"  warning: {text}")
            if run.writes and "back_to_step" in metrics[-1]:
                _drop_policies_from(run, round(metrics[-1]["back_to_step"]))
            stop = trainer.processes.any(bool(asked.asked))  # all of them at the same step
            if trainer.step_count in kept_steps and run.writes and not trainer.stopped_early:
                trainer.base.save_adapter(POLICY, run / "policy_snapshots" / f"step_{trainer.step_count:06d}")
            last = trainer.step_count >= total or trainer.stopped_early  # what is left of the stage may fail
            if stop or last or _is_due(config, trainer.step_count, time.monotonic() - saved):
                written = _save(trainer, run)
                saved = time.monotonic()
            if stop:
                trainer.processes.wait()  # for the save: a launcher ends all where one has ended
                raise StoppedAfterSaving("PPO", trainer.step_count, written)
    return metrics


def _drop_policies_from(run: RunDirectory, step: int) -> None:
    """Delete the policies that were kept after `step` and later: PPO went back to what that step began with."""
    for kept_after, folder in step_folders(run / "policy_snapshots"):
        if kept_after >= step:
            shutil.rmtree(folder)


def slow_controller(settings: PpoSettings) -> str | None:
    """Return that the adaptive KL coefficient can hardly move in the whole run, where that is so."""
    if not settings.adaptive_kl:
        return None
    episodes = settings.total_steps * settings.batch_size
    better = max(settings.batch_size, episodes // 25)
    reach, would_reach = (
        AdaptiveKl(settings.kl_coef, settings.kl_target, horizon).reach(settings.total_steps, settings.batch_size)
        for horizon in (settings.kl_horizon, better)
    )
    if reach >= LEAST_REACH:
        return None
    return (
        f"ppo.kl_horizon {settings.kl_horizon} is long for {episodes} answers: kl_coef can change by ×{reach:.2f} at "
        f"most, and may not hold ppo.kl_target; with {better} it can by ×{would_reach:.3g}"
    )


def _show_samples(trainer: PpoTrainer, run: RunDirectory, tracked: Tracker) -> None:
    """Keep and show a few of the step's answers with their scores, best and worst among them."""
    answered = trainer.answered
    if answered is None or not answered.scores:
        return
    by_score = sorted(range(len(answered.scores)), key=lambda i: answered.scores[i])
    shown = sorted({by_score[0], by_score[len(by_score) // 2], by_score[-1]})
    prompts = [trainer.pairs[answered.chosen[i]].messages[-1]["content"] for i in shown]
    texts, scores = [answered.texts[i] for i in shown], [answered.scores[i] for i in shown]
    rows = append_samples(run.path, trainer.step_count, prompts, texts, scores)
    tracked.table(trainer.step_count, rows)
    console.print(step_samples_table(StepSamples(trainer.step_count, rows)))


def without_skipped(metrics: list[Metrics]) -> list[Metrics]:
    """Return the metrics of the steps that were taken."""
    return [m for m in metrics if "skipped" not in m]


def _write_line(file: Any, metrics: Metrics) -> None:
    file.write(json.dumps(metrics) + "\n")
    file.flush()


def _is_due(config: RunConfig, step: int, seconds: float) -> bool:
    by_steps = config.save_steps > 0 and step % config.save_steps == 0
    return by_steps or (config.save_minutes > 0 and seconds >= 60 * config.save_minutes)


def _save(trainer: PpoTrainer, run: RunDirectory) -> bool:
    """Write a checkpoint; where that fails the run goes on, and the checkpoints before are as they were."""
    if not run.writes:
        return True
    write = functools.partial(write_trainer, trainer, run.config, run / METRICS)
    numbers = sum(parameter.numel() for own in trainer.parameters.values() for parameter in own)
    try:
        copied = numbers if trainer.within_limit.step else 0
        check_space_of_checkpoint(run.path, trainer.step_count, numbers, copied)
        write_checkpoint(run / "checkpoints" / "ppo", trainer.step_count, write, run.config.save_total_limit)
    except UserError as error:
        note(f"  no checkpoint of step {trainer.step_count}: {error}; the run goes on")
        return False
    return True


def _write_skipped(trainer: PpoTrainer, run: RunDirectory) -> None:
    """Write down what is needed to take a skipped step again from the checkpoint before it."""
    answered = trainer.answered
    if answered is None or not run.writes:
        return
    state = base64.b64encode(bytes(answered.random_state.tolist())).decode()
    record = {
        "step": trainer.step_count,
        "reason": trainer.skip_reason,
        "seed": run.config.seed,
        "pairs": answered.chosen,
        "answers": answered.texts,
        "scores": [str(score) for score in answered.scores],
        "random_state": state,
    }
    (run / "skipped").mkdir(exist_ok=True)
    write_text(run / "skipped" / f"step_{trainer.step_count:06d}.json", json.dumps(record, indent=1) + "\n")
