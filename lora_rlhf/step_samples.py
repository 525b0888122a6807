"""Sample answers on the way: what the policy said at some PPO steps, one JSON line per step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rich.table import Table
from rich.text import Text

from lora_rlhf.run import write_text

STEP_SAMPLES = "step_samples.jsonl"


class SampleAnswer(TypedDict):
    """An answer that PPO sampled."""

    prompt: str
    answer: str
    reward: float


@dataclass
class StepSamples:
    """The answers kept of one PPO step."""

    step: int
    rows: list[SampleAnswer]


def append_samples(
    run: Path, step: int, prompts: Sequence[str], answers: Sequence[str], rewards: Sequence[float]
) -> list[SampleAnswer]:
    """Add a line for `step` to the run's `step_samples.jsonl`, and return the answers as rows, as a tracker takes them.

    Args:
        run: the run's directory.
        step: the PPO step, counted from 1.
        prompts: what was asked, one text per answer.
        answers: what the policy said.
        rewards: what it got for each.
    """
    rows = [
        SampleAnswer(prompt=prompt, answer=answer, reward=float(reward))
        for prompt, answer, reward in zip(prompts, answers, rewards, strict=True)
    ]
    with (run / STEP_SAMPLES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "samples": rows}) + "\n")
    return rows


def drop_samples_from(run: Path, step: int) -> None:
    """Drop the lines of `step` and later from the run's file, and those that a crash left torn.

    To be called before PPO begins or goes on with `step`.
    """
    if (run / STEP_SAMPLES).is_file():
        kept = [json.dumps({"step": s.step, "samples": s.rows}) + "\n" for s in _samples(run) if s.step < step]
        write_text(run / STEP_SAMPLES, "".join(kept))


def last_samples(run: Path) -> StepSamples | None:
    """Return the answers of the latest step in the run's file; none where there are none that can be read."""
    return next(_samples(run, latest_first=True), None)


def step_samples_table(samples: StepSamples, most: int = 3) -> Table:
    """Return the first `most` answers of a step with their rewards."""
    table = Table(title=f"sample answers of step {samples.step}", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("answer", ratio=4)
    table.add_column("reward", justify="right", no_wrap=True)
    for row in samples.rows[:most]:
        table.add_row(printable(row["prompt"]), printable(row["answer"]), f"{row['reward']:+.2f}")
    return table


def printable(text: str) -> Text:
    """Return a model's text without what would steer the terminal: escape sequences, control characters."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))


def _samples(run: Path, latest_first: bool = False) -> Iterator[StepSamples]:
    """Yield what the whole lines of the file hold; torn and damaged ones are passed over."""
    try:
        lines = (run / STEP_SAMPLES).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in reversed(lines) if latest_first else lines:
        try:
            held = json.loads(line)
            rows = [
                SampleAnswer(prompt=str(row["prompt"]), answer=str(row["answer"]), reward=float(row["reward"]))
                for row in held["samples"]
            ]
            yield StepSamples(int(held["step"]), rows)
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            continue
