"""Watching a run: what is drawn, what the command prints as files change, and how it ends."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_runs import ROOT, assert_one_line_of_error
from watched_files import begin, finish, lines_of, step

from lora_rlhf.run import STAGES, write_text
from lora_rlhf.step_samples import append_samples
from lora_rlhf.watch import BARS, duration, sparkline
from lora_rlhf.watched_run import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begin(tmp_path / "run")


def watch(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, with its output in a pipe."""
    command = [sys.executable, "-m", "lora_rlhf.watch", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL
    )


# Drawn


@given(st.lists(st.floats(), max_size=200), st.integers(1, 80))
def test_a_sparkline_has_a_bar_for_each_share_of_the_values(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= {" ", *BARS}


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline(list(range(8)), 8) == BARS
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == BARS[0] + BARS[-1]
    assert sparkline([1.0, math.nan, 1.0], 3) == BARS[4] + " " + BARS[4]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (42.4, "42 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (7620, "2 h 07 min"), (math.nan, "?"), (math.inf, "?")],
)  # fmt: skip
def test_spans_of_time_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# The command


def finished(run: Path, steps: int = 8) -> None:
    (run / "metrics.jsonl").write_text(lines_of([step(i) for i in range(1, steps + 1)]))
    finish(run, *STAGES)


def test_once_shows_the_present_state_and_leaves(run: Path) -> None:
    finish(run, "base", "reward", "instruct")
    (run / "metrics.jsonl").write_text(lines_of([step(i) for i in range(1, 6)]))
    done = watch(str(run), "--once", "--steps", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 5 of 8, 4.0 s a step, about" in done.stdout
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    assert ["4", "+0.40", "+0.20"] in rows and ["5", "+0.50", "+0.20"] in rows and ["3", "+0.30", "+0.20"] not in rows
    assert ["ppo", "running"] in [row[:2] for row in rows] and ["merge", "waiting"] in [row[:2] for row in rows]
    assert sparkline([0.1 * i for i in range(1, 6)], 40) in done.stdout
    assert "\x1b" not in done.stdout


def test_skipped_steps_are_shown_as_such(run: Path) -> None:
    (run / "metrics.jsonl").write_text(lines_of([{"step": 1, "skipped": 1.0}]))
    assert "1  skipped" in watch(str(run), "--once").stdout
    (run / "metrics.jsonl").write_text(lines_of([step(1), {"step": 2, "skipped": 1.0}]))
    printed = watch(str(run), "--once").stdout
    assert "2  skipped" in printed and "nan" not in printed


def test_a_finished_run_ends_the_command_by_itself(run: Path) -> None:
    finished(run)
    done = watch(str(run))
    assert done.returncode == 0
    assert done.stdout.count("  finished  ") == 1
    assert "held-out prompts" in done.stdout


def test_answers_are_shown_only_when_asked_for(run: Path) -> None:
    finished(run)
    append_samples(run, 4, ["a question"], ["an old answer"], [0.0])
    append_samples(run, 8, ["a question"], ["a rude \x1b[2J answer"], [-1.25])
    shy, open_ = watch(str(run), "--once").stdout, watch(str(run), "--once", "--samples").stdout
    assert "rude" not in shy and "compared" not in shy and "--samples shows them" in shy
    assert "rude" in open_ and "-1.25" in open_ and "compared plus" in open_
    assert "old answer" not in open_ and "\x1b" not in open_


def test_without_a_terminal_new_steps_come_as_lines_until_the_run_ends(run: Path) -> None:
    finish(run, "base", "reward", "instruct")
    command = [sys.executable, "-m", "lora_rlhf.watch", str(run), "--every", "0.05"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        heads = [process.stdout.readline() for _ in STAGES]
        assert any("ppo" in line and "running" in line for line in heads)
        with (run / "metrics.jsonl").open("a") as file:
            for i in range(1, 4):
                text = lines_of([step(i)])
                for part in (text[:30], text[30:]):
                    file.write(part)
                    file.flush()
                    time.sleep(0.1)
        while process.stdout.readline().split()[:1] != ["3"]:
            assert process.poll() is None
        write_text(run / "metrics.jsonl", lines_of([step(1), step(2, reward=9.0)]))
        time.sleep(0.3)
        finish(run, *STAGES)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "goes on after step 2" in rest
    assert "ppo: done, 12 s" in rest and "compare: done" in rest
    assert rest.count("  finished  ") == 1


def in_terminal(run: Path, act: Callable[[subprocess.Popen[bytes]], None], *words: str) -> tuple[int, str]:
    """Run the command in a terminal; `act` is called once it shows the run. Return its status and all it wrote."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lora_rlhf.watch", str(run), "--every", "0.05", *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written, acted, until = b"", False, time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                written += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        if b"compare" in written and not acted:
            acted = True
            act(process)
    os.close(ours)
    return process.wait(10), written.decode(errors="replace")


def test_in_a_terminal_it_follows_and_ends_with_the_run(run: Path) -> None:
    finish(run, "base", "reward", "instruct")

    def act(process: subprocess.Popen[bytes]) -> None:
        (run / "metrics.jsonl").write_text(lines_of([step(1), step(2)]))
        time.sleep(0.5)
        finished(run)

    status, written = in_terminal(run, act)
    assert status == 0
    assert "step 2 of 8" in written and "step 8 of 8" in written
    assert written.rindex("finished") > written.rindex("running")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back


def test_ctrl_c_leaves_cleanly(run: Path) -> None:
    status, written = in_terminal(run, lambda process: process.send_signal(signal.SIGINT))
    assert status == 0
    assert "Traceback" not in written
    assert "no longer watching; the run is as it was" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), ("holds no run", "config.yaml")),
        (lambda run: (run / "config.yaml").write_text("a: ["), ("config.yaml is damaged",)),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff"), ("config.yaml is damaged",)),
        (lambda run: (run / "summary.json").write_text('{"seconds": 3}'), ("summary.json is damaged",)),
        (lambda run: (run / "metrics.jsonl").write_text("no\nmetrics\n"), ("metrics.jsonl is damaged", "line 1")),
        (lambda run: (run / "samples.json").write_text('{"prompts": 4}'), ("samples.json is damaged",)),
        (lambda run: write_text(run / "summary.json", json.dumps({"seconds": {"compare": 1}, "arms": {"base": {}}})),
         ("summary.json is damaged", "arms")),
        (lambda run: (run / "step_samples.jsonl").mkdir(), ("step_samples.jsonl cannot be read",)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_of_error(run: Path, spoil: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    finished(run)
    spoil(run)
    done = watch(str(run), "--samples")
    assert_one_line_of_error(done.returncode, done.stdout + done.stderr, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}s"], ("no directory", "did you mean {run}?")),
        (["{run}/.."], ("holds no run", "there are runs inside: {run}")),
        (["{run}/config.yaml"], ("is a file",)),
        (["{run}", "--steps", "-1"], ("--steps is 0 or more",)),
        (["{run}", "--every", "0"], ("--every is above 0",)),
        (["{run}", "--every", "nan"], ("--every is above 0",)),
        (["{run}", "--sampels"], ("--sampels", "see --help")),
        ([], ("DIR", "see --help")),
    ],
)
def test_a_wrong_word_is_one_line_of_error(run: Path, words: list[str], said: tuple[str, ...]) -> None:
    done = watch(*(word.format(run=run) for word in words))
    assert_one_line_of_error(
        done.returncode,
        done.stdout + done.stderr,
        *(str(word).format(run=run) for word in said if "inside" not in word),
    )
    assert "Traceback" not in done.stdout


def test_the_reader_of_the_output_may_leave(run: Path) -> None:
    finished(run, steps=3000)
    command = f"{sys.executable} -m lora_rlhf.watch {run} --steps 100000 | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "finished" in done.stdout


def test_help_teaches_and_starts_without_torch() -> None:
    done = watch("--help")
    assert done.returncode == 0
    for word in ("--once", "--samples", "--steps", "--every", "Ctrl-C", "offensive"):
        assert word in done.stdout
    code = "import sys, lora_rlhf.watch; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_real_run_can_be_watched(run_folder: Path) -> None:
    held = read_run(run_folder)
    assert held.finished
    assert len(held.metrics) == held.total_steps == held.summary["ppo"]["steps"]
    done = watch(str(run_folder), "--samples")
    assert done.returncode == 0
    assert f"step {held.total_steps} of {held.total_steps}" in done.stdout
