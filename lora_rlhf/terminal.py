"""What a run shows in the terminal: headings, progress bars, tables, and errors without a traceback."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_rlhf.errors import UserError, first_line

console = Console(highlight=False)


AGAIN = "The same command goes on from there: finished stages and saved steps are not repeated."


class Interrupt:
    """Ctrl-C and SIGTERM outside of training: the recipe ends.

    Python drops an exception that is raised in a destructor, as when a model is freed; `mind` raises it once more.

    Attributes:
        asked: whether a signal has come.
        again: how the run goes on; what is interrupted says it.
    """

    asked = False
    again = AGAIN

    def __call__(self, *_: Any) -> None:
        """Take a signal."""
        self.asked = True
        raise KeyboardInterrupt

    def mind(self) -> None:
        """Raise `KeyboardInterrupt` where a signal has come and the recipe still runs."""
        if self.asked:
            raise KeyboardInterrupt


interrupt = Interrupt()


def run_recipe(main: Callable[[], None], again: str = AGAIN) -> None:
    """Call `main`; errors meant for people are printed as such (status 2), Ctrl-C ends with status 130.

    Args:
        main: the command.
        again: what to say of an interrupted one.
    """
    for name in ("transformers", "datasets", "bitsandbytes", "torch", "trl", "accelerate", "peft", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model's answer, or a line, may be more than a terminal can show
    interrupt.asked, interrupt.again = False, again
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)  # the system's way to say Ctrl-C
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for jobs in the background of a script
            signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except UserError as error:
        _print_error(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        where = f" {stopped}" if str(stopped) else ""
        console.print(f"\nstopped{where}. {interrupt.again}")
        sys.exit(130)
    except Exception as error:
        from lora_rlhf.memory_peak import ran_out  # late: it imports torch, which --help can do without

        if _is_of_the_disk(error):
            what = getattr(error, "filename", None) or "a file"
            problem = f"{what} could not be written ({error}): make room or choose another place"
        elif ran_out(error):
            problem = (
                f"memory ran out ({first_line(error)}): end what else uses it, or take smaller batches, shorter texts "
                "or a smaller model"
            )
        else:
            raise
        _print_error(f"error: {problem}. {interrupt.again}")
        sys.exit(2)
    finally:
        interrupt.asked = False


def _print_error(text: str) -> None:
    """Print an error; of several processes, those that are silent otherwise say which one they are."""
    if console.quiet:
        console.quiet = False
        text = f"process {os.environ.get('RANK', '?')}: {text}"
    console.print(Text(text, style="red"), soft_wrap=True)


def _is_of_the_disk(error: Exception) -> bool:
    """Return whether a file could not be written for want of room, or of leave.

    What is written in Rust (safetensors, tokenizers) has errors of other classes, some of them bare `Exception`.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number}" in str(error) for number in numbers)


def heading(stage: str, text: str) -> None:
    """Print the heading of a stage."""
    console.rule(Text.assemble((stage, "bold cyan"), f"  {text}"), align="left")


def note(text: str) -> None:
    """Print a line of plain text."""
    console.print(Text(text), soft_wrap=True)


def warning(text: str) -> None:
    """Print a line in red: what a person should know before going on."""
    console.print(Text(text, style="red"), soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar; the block calls what it is given with the number of finished pieces (and of all)."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done, of=None: bar.update(task, completed=done, total=total if of is None else of)


STEP_COLUMNS = (
    ("step", "step", "{:.0f}"), ("reward", "reward", "{:+.2f}"), ("score", "score", "{:+.2f}"), ("kl", "kl", "{:.2f}"),
    ("entropy", "entropy", "{:.2f}"), ("value_loss", "v.loss", "{:.2f}"), ("ratio", "ratio", "{:.3f}"),
    ("clip_fraction", "clip", "{:.2f}"), ("response_length", "length", "{:.1f}"), ("ended_rate", "ended", "{:.0%}"),
    ("samples_per_second", "smp/s", "{:.2f}"), ("peak_memory_gib", "GiB", "{:.1f}"),
)  # fmt: skip


def step_heading() -> str:
    """Return the line above the PPO steps."""
    return " ".join(f"{title:>8}" for _, title, _ in STEP_COLUMNS)


def step_line(metrics: Mapping[str, float]) -> str:
    """Return the line of one PPO step; a step that learned nothing lacks some metrics."""
    return " ".join(f"{form.format(metrics[key]) if key in metrics else '-':>8}" for key, _, form in STEP_COLUMNS)


SAFETY_KEYS = ("decline_unsafe", "decline_safe", "safe_margin")
"""What `arm_safety` measures, in the order of the table; runs of earlier versions lack it."""


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table that compares the arms."""
    table = Table(
        title="held-out prompts: reward in sd of the reference's, wins and KL against base; safety prompts: share "
        "declined (high on unsafe, low on safe ones is good), share with the right kind of answer likelier",
        title_justify="left",
    )
    columns = ("arm", "reward", "wins", "KL", "ended", "bad words", "declines unsafe", "… safe", "margin", "n")
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in arms.items():
        kl = "-" if arm["kl_to_base"] is None else f"{arm['kl_to_base']:.2f}"
        rates = [f"{arm[key]:.0%}" for key in ("win_rate_vs_base", "ended_rate", "bad_word_rate")]
        reward = f"{arm['reward_mean']:+.2f} ± {arm['reward_sem']:.2f}"
        safety = [f"{arm[key]:.0%}" if key in arm else "-" for key in SAFETY_KEYS]
        table.add_row(name, reward, rates[0], kl, *rates[1:], *safety, str(arm["n"]))
    return table


def samples_table(prompts: list[str], answers: Mapping[str, list[str]]) -> Table:
    """Return sample answers, one column per arm."""
    table = Table(title="sample answers", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for arm in answers:
        table.add_column(arm, ratio=2)
    for i, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(texts[i]) for texts in answers.values()))
    return table
