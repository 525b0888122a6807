"""What the files of a run say while they grow, are torn, cut, replaced or full of something else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from watched_files import begin, finish, lines_of, step

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.run import LOCK, STAGES, write_text
from lora_rlhf.watch import follow
from lora_rlhf.watched_run import WatchedRun, read_metrics, read_run, run_warnings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begin(tmp_path / "run")


def states(run: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in read_run(run).stages}


# What the files say


def test_a_run_that_has_just_begun_runs_its_first_stage(run: Path) -> None:
    assert states(run) == {"base": "running"} | dict.fromkeys(STAGES[1:], "waiting")
    held = read_run(run)
    assert (held.metrics, held.seconds_left, held.finished) == ([], None, False)


def test_stages_are_done_running_and_waiting_with_their_seconds(run: Path) -> None:
    finish(run, "base", "reward")
    began = (run / "summary.json").stat().st_mtime
    held = read_run(run, now=began + 33)
    assert [(s.state, s.seconds) for s in held.stages] == [
        ("done", 12.5), ("done", 12.5), ("running", 33), ("waiting", None), ("waiting", None), ("waiting", None),
    ]  # fmt: skip
    finish(run, *STAGES)
    assert read_run(run).finished


def test_stages_that_the_config_makes_needless_are_not_waited_for(run: Path) -> None:
    config = RunConfig(instruct_model_name_or_path="some/model")
    config.ppo.reward_sources = [{"kind": "model", "path": "some/reward"}]
    write_text(run / "config.yaml", yaml.safe_dump(config_to_mapping(config)))
    finish(run, "base", "ppo", "merge", "compare")
    assert states(run)["instruct"] == states(run)["reward"] == "not needed"
    assert read_run(run).finished
    config.ppo.reward_sources.append({"kind": "adapter"})
    write_text(run / "config.yaml", yaml.safe_dump(config_to_mapping(config)))
    assert states(run)["reward"] == "running"


def test_the_time_left_comes_from_the_median_and_shrinks_between_steps(run: Path) -> None:
    finish(run, "base", "reward", "instruct")
    slow = step(3, seconds_rollout=300.0)
    (run / "metrics.jsonl").write_text(lines_of([step(1), step(2), slow, step(4), step(5)]))
    written = (run / "metrics.jsonl").stat().st_mtime
    held = read_run(run, now=written)
    assert held.step_seconds == 4.0
    assert held.seconds_left == 3 * 4.0
    assert read_run(run, now=written + 2.5).seconds_left == pytest.approx(9.5)
    assert read_run(run, now=written + 60).seconds_left == 0


def test_steps_that_no_longer_come_are_noticed(run: Path) -> None:
    finish(run, "base", "reward", "instruct")
    (run / "metrics.jsonl").write_text(lines_of([step(1), step(2)]))
    written = (run / "metrics.jsonl").stat().st_mtime
    assert not run_warnings(read_run(run, now=written + 60))
    held = read_run(run, now=written + 600)
    assert [s.state for s in held.stages if s.name == "ppo"] == ["stopped?"]
    assert any("seems to be stopped" in warning for warning in run_warnings(held))


def test_a_process_that_has_ended_is_noticed_and_one_at_work_is_not(run: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for owner, state in ((f"{os.getpid()}\n", "running"), (f"{ended.pid}\n", "stopped?"), ("", "running")):
        (run / LOCK).write_text(owner)
        assert states(run)["base"] == state


def test_skipped_steps_are_steps_without_numbers(run: Path) -> None:
    finish(run, "base", "reward", "instruct")
    skipped = {"step": 6, "episodes": 48, "skipped": 1.0, "kl_coef": 0.05}
    (run / "metrics.jsonl").write_text(lines_of([*(step(i, ended_rate=0.2) for i in range(1, 6)), skipped]))
    held = read_run(run, now=(run / "metrics.jsonl").stat().st_mtime)
    assert held.metrics[-1]["step"] == 6 and held.taken[-1]["step"] == 5
    assert held.seconds_left == 8
    assert ["answers end" in warning for warning in run_warnings(held)] == [True]


def test_a_config_of_another_version_can_be_watched(run: Path) -> None:
    write_text(run / "config.yaml", "ppo: {total_steps: 3, no_such_field: 1}\nnew_section: {a: 1}\n")
    assert read_run(run).total_steps == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl": 45.0}, "ppo.max_kl (50)"),
        ({"kl": -3.0}, "below 0"),
        ({"kl": math.nan}, "not a finite number: kl"),
        ({"clip_fraction": 0.6}, "60% of ratios"),
        ({"ended_rate": 0.2}, "only 20% of answers end"),
        ({"entropy": 0.01}, "entropy fell"),
        ({"sampler_kl": 0.5}, "0.50 nats"),
    ],
)
def test_what_looks_wrong_is_said_and_only_that(run: Path, change: dict[str, float], words: str) -> None:
    steps = [step(1), *(step(i) for i in range(2, 7))]
    (run / "metrics.jsonl").write_text(lines_of(steps))
    assert run_warnings(read_run(run)) == []
    (run / "metrics.jsonl").write_text(lines_of([step(1), *(step(i, **change) for i in range(2, 7))]))
    (warning,) = run_warnings(read_run(run))
    assert words in warning


def test_skipped_batches_and_an_early_stop_are_said(run: Path) -> None:
    (run / "skipped").mkdir()
    for name in ("step_000002.json", "step_000005.json"):
        (run / "skipped" / name).write_text("{}")
    write_text(run / "summary.json", json.dumps({"seconds": {"ppo": 3}, "ppo": {"stopped_early": "KL 51 > 50"}}))
    warnings = run_warnings(read_run(run))
    assert len(warnings) == 2
    assert "2 in" in warnings[0] and "step_000005.json" in warnings[0]
    assert "KL 51 > 50" in warnings[1]


# Files that grow, are torn, cut and replaced


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    text = lines_of([step(1), step(2), step(3)])
    for cut in range(len(text) + 1):
        file.write_text(text[:cut])
        held, damaged = read_metrics(file)
        assert [m["step"] for m in held] == list(range(1, text[:cut].count("\n") + 1))
        assert damaged == 0


def test_a_line_torn_by_a_crash_is_counted_and_passed_over(run: Path) -> None:
    (run / "metrics.jsonl").write_text(lines_of([step(1)]) + '{"step": 2, "rew\n' + lines_of([step(2), step(3)]))
    held = read_run(run)
    assert [m["step"] for m in held.metrics] == [1, 2, 3]
    assert run_warnings(held) == ["metrics.jsonl: 1 lines cannot be read, and are left out"]


def test_steps_taken_again_replace_the_old_ones_and_what_followed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines_of([step(1), step(2), step(3), step(4), step(2, reward=9.0), step(3, reward=9.0)]))
    assert [(m["step"], m["reward"]) for m in read_metrics(file)[0]] == [(1, 0.1), (2, 9.0), (3, 9.0)]


@given(st.lists(st.binary(max_size=60) | st.from_type(dict[str, float]).map(lambda d: json.dumps(d).encode())))
def test_whatever_is_between_the_lines_the_steps_are_read(
    tmp_path_factory: pytest.TempPathFactory, garbage: list[bytes]
) -> None:
    file = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    file.write_bytes(b"\n".join([*garbage, b""]) + lines_of([step(1), step(2)]).encode())
    held, _ = read_metrics(file)
    assert [m["step"] for m in held if m["step"] in (1, 2)] == [1, 2]
    assert all(math.isfinite(m["step"]) and isinstance(v, float) for m in held for v in m.values())


def test_following_sees_every_state_of_files_that_grow_and_are_cut_and_replaced(run: Path) -> None:
    file = run / "metrics.jsonl"
    seen: list[Any] = []
    acts: list[Callable[[], Any]] = [
        lambda: finish(run, "base", "reward", "instruct"),
        lambda: file.write_text(lines_of([step(1)])),
        lambda: file.open("a").write(lines_of([step(2), step(3)]) + '{"step": 4, "re'),
        lambda: os.truncate(file, len(lines_of([step(1)]))),
        lambda: write_text(file, lines_of([step(1), step(2, reward=5.0)])),
        lambda: file.open("a").write(lines_of([step(3)])),
        lambda: finish(run, *STAGES),
    ]

    def show(held: WatchedRun) -> None:
        seen.append([m["reward"] for m in held.metrics])
        acts.pop(0)()

    follow(run, 0.01, show=lambda held: show(held) if acts else seen.append("end"))
    first, second, third = 0.1, 0.2, pytest.approx(0.3)
    assert seen == [[], [], [first], [first, second, third], [first], [first, 5.0], [first, 5.0, third], "end"]


def test_a_run_started_afresh_is_waited_for_and_one_that_is_gone_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (run / "config.yaml").read_text()
    finish(run, *STAGES[:-1])

    def begin_afresh() -> None:
        (run / "config.yaml").unlink()
        time.sleep(0.3)
        write_text(run / "config.yaml", config)
        finish(run, *STAGES)

    fresh = threading.Thread(target=begin_afresh)
    follow(run, 0.05, lambda held: fresh.start() if fresh.ident is None else None)
    fresh.join()

    monkeypatch.setattr("lora_rlhf.watch.PATIENCE", 0.2)
    write_text(run / "summary.json", "{}")
    with pytest.raises(UserError, match="holds no run"):
        follow(run, 0.05, lambda held: (run / "config.yaml").unlink(missing_ok=True))
