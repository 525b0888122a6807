"""How is the run doing? Stages, steps, time left, curves and warnings, from the files in its output directory.

    python -m lora_rlhf.watch runs/embedded              # follow it until it is finished, or Ctrl-C
    python -m lora_rlhf.watch runs/embedded --once       # as it is now
    python -m lora_rlhf.watch runs/embedded --samples    # with the latest sample answers and their rewards

It only reads: start and leave it at any time, in another terminal, also on a run that is finished or was stopped.
Where the output is no terminal, it prints the present state once and then each new step as a line. Sample answers may
be offensive, and are shown only with --samples.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_rlhf.errors import UserError
from lora_rlhf.step_samples import last_samples, printable, step_samples_table
from lora_rlhf.terminal import (
    STEP_COLUMNS,
    arms_table,
    console,
    note,
    run_recipe,
    samples_table,
    step_heading,
    step_line,
)
from lora_rlhf.watched_run import WatchedRun, read_run, run_warnings

CURVES = (
    ("reward", "reward", "{:+.2f}"), ("kl", "KL to base", "{:.2f}"), ("ended_rate", "ended", "{:.0%}"),
    ("response_length", "length", "{:.1f}"),
)  # fmt: skip
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*%#"
MARKS = {"done": "green", "running": "bold cyan", "waiting": "dim", "not needed": "dim", "stopped?": "bold yellow"}
PATIENCE = 5.0
"""Seconds for which a run that is being started afresh may have no config."""


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Return a curve in one line of at most `width` characters; each stands for the mean of its share of the values.

    A share without a finite number is a space, and a flat curve is drawn in the middle.
    """
    pieces = min(width, len(values))
    means = []
    for i in range(pieces):
        share = values[i * len(values) // pieces : (i + 1) * len(values) // pieces]
        finite = [value for value in share if math.isfinite(value)]
        means.append(sum(value / len(finite) for value in finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def bar(mean: float) -> str:
        if not math.isfinite(mean):
            return " "
        span = high / 2 - low / 2  # halves, which cannot overflow
        share = (mean / 2 - low / 2) / span if span > 0 else 0.5
        return bars[min(len(bars) - 1, int(share * len(bars)))]

    return "".join(map(bar, means))


def duration(seconds: float) -> str:
    """Return a span of time as people read it: 42 s, 3 min 05 s, 2 h 07 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def run_view(run: WatchedRun, steps: int, samples: bool) -> list[RenderableType]:
    """Return what is shown of a run, from top to bottom.

    Args:
        run: the run as its files show it.
        steps: most step lines.
        samples: show sample answers too.
    """
    view: list[RenderableType] = [_title(run), _stage_table(run)]
    if run.metrics:
        view += [Text(), _progress_line(run), Text(), *_curves(run)]
        last = run.metrics[max(0, len(run.metrics) - steps) :]
        lines = [step_heading(), *map(_step_line, last)] if last else []
        view += [Text(line, no_wrap=True, overflow="crop") for line in lines]
    warnings = run_warnings(run)
    view += [Text(f"warning: {warning}", style="yellow") for warning in warnings]
    if run.stage_done("compare"):
        view += [Text(), _arms(run)]
    return view + list(_samples(run, samples))


def _title(run: WatchedRun) -> Text:
    state = "finished" if run.finished else next(s.state for s in run.stages if s.state in ("running", "stopped?"))
    model = str(run.config.get("model_name_or_path", ""))
    return Text.assemble((str(run.path), "bold"), "  ", (state, MARKS.get(state, "green")), f"  {model}")


def _stage_table(run: WatchedRun) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for stage in run.stages:
        text = "" if stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.name, Text(stage.state, style=MARKS[stage.state]), Text(text, justify="right"))
    return table


def _progress_line(run: WatchedRun) -> Table:
    step, total = run.metrics[-1]["step"], run.total_steps
    said = f"step {step:.0f}" + (f" of {total}" if total else "")
    if run.step_seconds is not None:
        said += f", {duration(run.step_seconds)} a step"
    if run.seconds_left is not None:
        said += f", about {duration(run.seconds_left)} left"
    line = Table.grid(padding=(0, 1))
    line.add_row("ppo", ProgressBar(total=total or step, completed=step, width=30), Text(said))
    return line


def _curves(run: WatchedRun) -> Iterator[RenderableType]:
    if not run.taken:
        return
    width = max(10, min(60, console.width - 40))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, title, form in CURVES:
        values = [metrics.get(key, math.nan) for metrics in run.taken]
        bars = sparkline(values, width, ASCII_BARS if console.options.ascii_only else BARS)
        first, last = form.format(values[0]), form.format(values[-1])
        table.add_row(title, Text(first, justify="right"), Text(bars, style="cyan"), Text(last))
    yield table
    yield Text()


def _step_line(metrics: Any) -> str:
    if "skipped" in metrics:
        return f"{metrics['step']:>8.0f}  skipped: NaN or infinity"
    return step_line({key: metrics.get(key, math.nan) for key, *_ in STEP_COLUMNS})


def _arms(run: WatchedRun) -> Table:
    try:
        return arms_table(run.summary["arms"])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{run.path / 'summary.json'} is damaged: arms; delete it to run the stages again") from None


def _samples(run: WatchedRun, shown: bool) -> Iterator[RenderableType]:
    held = last_samples(run.path)
    compared = run.stage_done("compare") and (run.path / "samples.json").is_file()
    if not shown:
        if held or compared:
            yield Text("sample answers: --samples shows them", style="dim")
        return
    if held:
        yield step_samples_table(held)
    if compared:
        file = run.path / "samples.json"
        try:
            answers = json.loads(file.read_text(encoding="utf-8"))
            prompts = answers.pop("prompts")[:3]
            first = {
                str(arm): [printable(texts[i]).plain for i in range(len(prompts))] for arm, texts in answers.items()
            }
            yield samples_table([printable(prompt).plain for prompt in prompts], first)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{file} is damaged: no prompts with an answer of each arm") from None
    if not held and not compared:
        yield Text("no sample answers yet", style="dim")


def _print(view: Sequence[RenderableType]) -> None:
    for part in view:
        console.print(part, soft_wrap=isinstance(part, Text))


def follow(path: Path, every: float, show: Callable[[WatchedRun], None]) -> None:
    """Call `show` with the state of the run in `path`, again and again, until it is finished.

    Args:
        path: the run's output directory.
        every: seconds between two looks.
        show: what is done with each state.

    Raises:
        UserError: it is no run; or it has been none for some seconds, which a run started afresh may be for a moment.
    """
    run = read_run(path)
    seen = time.monotonic()
    while True:
        show(run)
        if run.finished:
            return
        time.sleep(every)
        try:
            run = read_run(path)
            seen = time.monotonic()
        except UserError:
            if time.monotonic() - seen > PATIENCE:
                raise


def _follow_in_terminal(path: Path, every: float, steps: int | None, samples: bool) -> None:
    run = read_run(path)
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:

        def show(run: WatchedRun) -> None:
            lines = max(3, console.height - 24) if steps is None else steps
            live.update(Group(*run_view(run, lines, samples)), refresh=True)

        show(run)
        follow(path, every, show)


def _follow_in_lines(path: Path, every: float, steps: int, samples: bool) -> None:
    """Print the present state, then each new step and each finished stage as a line."""
    shown: WatchedRun | None = None

    def show(run: WatchedRun) -> None:
        nonlocal shown
        if shown is None:
            _print(run_view(run, steps, samples))
        else:
            _print_news(shown, run)
            if run.finished:
                _print([Text(), *run_view(run, 0, samples)])
        shown = run

    follow(path, every, show)


def _print_news(before: WatchedRun, now: WatchedRun) -> None:
    at = before.metrics[-1]["step"] if before.metrics else 0.0
    if before.metrics and (not now.metrics or now.metrics[-1]["step"] < at):
        at = now.metrics[-1]["step"] if now.metrics else 0.0
        note(f"goes on after step {at:.0f}")
    if not before.metrics and now.metrics:
        note(step_heading())
    for metrics in now.metrics:
        if metrics["step"] > at:
            note(_step_line(metrics))
    for old, new in zip(before.stages, now.stages, strict=True):
        if old.state != new.state and new.state in ("done", "running", "stopped?"):
            took = f", {duration(new.seconds)}" if new.state == "done" and new.seconds is not None else ""
            note(f"{new.name}: {new.state}{took}")
    said = {_without_numbers(warning) for warning in run_warnings(before)}
    for warning in run_warnings(now):
        if _without_numbers(warning) not in said:
            note(f"warning: {warning}")


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,%]+", "", text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main() -> None:
    """Be the command."""
    parser = _Parser(
        prog="python -m lora_rlhf.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="DIR", type=Path, help="output directory of a run (its --output_dir)")
    parser.add_argument("--once", action="store_true", help="show the present state and leave")
    parser.add_argument("--samples", action="store_true", help="show the latest sample answers; they may be offensive")
    parser.add_argument("--steps", type=int, metavar="N", help="most step lines [as many as there is room for, or 10]")
    parser.add_argument("--every", type=float, metavar="SECONDS", default=1.0, help="seconds between two looks [1]")
    given = parser.parse_args()
    if given.steps is not None and given.steps < 0:
        raise UserError(f"--steps is 0 or more, not {given.steps}")
    if not 0 < given.every < math.inf:
        raise UserError(f"--every is above 0, not {given.every:g}")
    try:
        if given.once:
            _print(run_view(read_run(given.run), 10 if given.steps is None else given.steps, given.samples))
        elif console.is_terminal:
            _follow_in_terminal(given.run, given.every, given.steps, given.samples)
        else:
            _follow_in_lines(given.run, given.every, 10 if given.steps is None else given.steps, given.samples)
    except KeyboardInterrupt:
        note("no longer watching; the run is as it was")
    except OSError as error:
        raise UserError(f"{error.filename or given.run} cannot be read: {error.strerror}") from None


if __name__ == "__main__":
    run_recipe(main)
