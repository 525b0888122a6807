"""The first Ctrl-C saves, the second leaves; the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_runs import IN_STAGES, ROOT, TINY, in_stage, outcome

import lora_rlhf.session
import lora_rlhf.stages
from lora_rlhf.errors import UserError
from lora_rlhf.interruption import interruption
from lora_rlhf.run import LOCK, STAGES, lock, run_summary

PPO = ["--ppo.total_steps", "400", "--save_steps", "0", "--save_minutes", "0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_rlhf.interruption.ONE_REQUEST", 0)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruption() as asked:
        assert asked.asked is None
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert asked.asked == signal.Signals(number).name
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_twice_at_once_is_one_request() -> None:
    with interruption() as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert asked.asked == "SIGTERM"


class Run:
    """The pipeline as a process, and what it has printed."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log = folder.parent / "log"
        command = [sys.executable, "recipes/direct_rlhf_lora.py", *TINY, *PPO, "--output_dir", str(folder), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def waits_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + 120
        while self.printed.count(text) < times:
            assert time.monotonic() < end and self.process.poll() is None, self.printed
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_saves_its_step_leaves_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    run = Run(folder)
    run.waits_for("clip")  # the heading above the steps
    time.sleep(1)
    run.process.send_signal(number)
    assert run.process.wait(timeout=60) == 130
    assert f"{number.name}: this step is finished and saved first" in run.printed
    assert "stopped after PPO step" in run.printed and "The same command goes on from there" in run.printed
    assert "Traceback" not in run.printed
    (checkpoint,) = (folder / "checkpoints" / "ppo").iterdir()
    again = Run(folder)
    again.waits_for(f"going on after step {int(checkpoint.name[5:])}, from {checkpoint}")
    for _ in range(2):
        again.process.send_signal(signal.SIGINT)
    assert again.process.wait(timeout=60) in (130, -signal.SIGINT)  # the second may come when all is done
    assert "Traceback" not in again.printed


def test_sigterm_in_each_stage(
    recipe: Callable[..., tuple[int, str]], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, ended in every one of its stages: what it comes to is what an undisturbed one comes to."""
    run = tmp_path / "run"
    for stage in STAGES:
        with in_stage(monkeypatch, stage, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
        assert status == 130 and "The same command goes on from there" in printed, printed
        assert "Traceback" not in printed
        assert list(run_summary(run).get("seconds", {})) == list(STAGES[: STAGES.index(stage)])
        if stage in ("reward", "instruct", "ppo"):
            assert re.search(rf"stopped after {stage} step [1-3]\.", printed, re.IGNORECASE)
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
    assert status == 0, printed
    assert outcome(run) == outcome(run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "instruct", "ppo"])
def test_sigterm_in_the_last_step_of_a_stage_ends_the_run_too(
    recipe: Callable[..., tuple[int, str]],
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """What is left of the stage, and those after it, are for the next start."""
    monkeypatch.setitem(IN_STAGES, stage, (IN_STAGES[stage][0], 3 if stage == "ppo" else 4))
    run = tmp_path / "run"
    with in_stage(monkeypatch, stage, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
    assert status == 130 and re.search(rf"stopped after {stage} step [34]\.", printed, re.IGNORECASE), printed
    assert stage not in run_summary(run)["seconds"]
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
    assert status == 0, printed
    assert outcome(run) == outcome(run_folder)


class Signals:
    """Sends SIGTERM when it is freed, where Python drops whatever is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stage", [pytest.param("reward", marks=pytest.mark.slow), "ppo", "merge"])
def test_a_signal_while_a_model_is_freed_ends_the_run(
    recipe: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Python drops what is raised in a destructor, and the run would go on to its end."""
    plain, begun = lora_rlhf.session.return_freed_memory, []

    def frees() -> None:
        if stage in begun:
            Signals()
        plain()

    monkeypatch.setattr(lora_rlhf.stages, "heading", lambda name, _: begun.append(name))
    monkeypatch.setattr(lora_rlhf.session, "return_freed_memory", frees)
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(tmp_path / "run"))
    assert status == 130 and begun[-1] == stage, printed
    assert stage not in run_summary(tmp_path / "run")["seconds"]


def test_a_config_that_overwrites_is_told_to_leave_that_out(
    recipe: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / TINY[1]).read_text() + "overwrite_output_dir: true\n")
    with in_stage(monkeypatch, "base", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        found = recipe("direct_rlhf_lora.py", "--config", str(config), "--output_dir", str(tmp_path / "run"))
    assert found[0] == 130 and "The same command without overwrite_output_dir goes on" in found[1].replace("\n", " ")


@pytest.mark.slow
def test_the_reward_stage_saves_its_step_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "--reward.max_steps", "5000")
    run.waits_for("loss")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 130
    assert "stopped after reward step" in run.printed and "Traceback" not in run.printed
    again = Run(tmp_path / "run", "--reward.max_steps", "5000")
    again.waits_for("going on after optimizer step")
    again.process.kill()


@pytest.mark.slow
def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder)
    run.waits_for("NF4")
    second = subprocess.run(
        [sys.executable, "recipes/direct_rlhf_lora.py", *TINY, *PPO, "--output_dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"another run (process {run.process.pid}) is at work in {folder}" in second.stdout.replace("\n", " ")
    with pytest.raises(UserError, match="another run"):
        lock(folder / LOCK)
    run.process.kill()
    run.process.wait()
    lock(folder / LOCK)  # a killed run holds nothing
