"""Two processes come to what one comes to, end together, and leave a checkpoint that any number goes on from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_runs import (
    UNEVEN,
    accelerate,
    adapters,
    assert_same_adapters,
    free_port,
    kill,
    launched,
    log_of,
    started,
    wait_for_checkpoint,
    wait_for_line,
    workers,
)
from recipe_runs import TINY
from trainer_cases import MakeTrainer

from lora_rlhf.errors import UserError
from lora_rlhf.processes import Processes, words_for_the_lost
from lora_rlhf.reward.sources import ScoreScale
from lora_rlhf.terminal import console, run_recipe


def two_nodes(folder: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """Start both on this machine, by the launch file for two, with a process each."""
    port = free_port()
    node = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--machine_rank"]
    options = (*TINY, *UNEVEN, *options)
    return [launched(folder, accelerate("two_nodes", port, *node, str(rank)), *options) for rank in range(2)]


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert started(folder, 1, "--ppo.total_steps", "5").wait(timeout=300) == 0, log_of(folder)
    return folder


def assert_equal_to(one: Path, other: Path) -> None:
    assert_same_adapters(one, other)
    assert any(tensor.abs().max() > 0.1 for tensor in adapters(one, "policy_adapter").values())
    assert steps_of(other) == [1, 2, 3, 4, 5]
    assert (other / "samples.json").read_text() == (one / "samples.json").read_text()
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    assert found["reward_model"] == expected["reward_model"]
    for arm, figures in expected["arms"].items():
        assert found["arms"][arm] == pytest.approx(figures, abs=2e-6)


@pytest.mark.slow
def test_two_processes_give_the_adapters_of_one(one: Path, tmp_path: Path) -> None:
    assert started(tmp_path / "run", 2, "--ppo.total_steps", "5").wait(timeout=300) == 0, log_of(tmp_path / "run")
    assert_equal_to(one, tmp_path / "run")
    assert log_of(tmp_path / "run").count("everything is in") == 1  # one of them writes


@pytest.mark.slow
def test_two_nodes_give_the_adapters_of_one(one: Path, tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path / "run", "--ppo.total_steps", "5")
    assert [run.wait(timeout=300) for run in nodes] == [0, 0], log_of(tmp_path / "run")
    assert_equal_to(one, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(one: Path, tmp_path: Path, first: int, then: int) -> None:
    folder = tmp_path / "run"
    run = started(folder, first, "--ppo.total_steps", "5")
    wait_for_checkpoint(run, folder, "ppo")
    kill(run)
    assert started(folder, then, "--ppo.total_steps", "5").wait(timeout=300) == 0, log_of(folder)
    assert_equal_to(one, folder)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = started(folder, 2, "--ppo.total_steps", "400")
    wait_for_checkpoint(run, folder, "ppo")
    both = workers(run)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert re.search("another process of this run has ended or hangs|Signal 9|SIGKILL|exitcode", log_of(folder))
    again = started(folder, 1, "--ppo.total_steps", "400")
    wait_for_line(again, folder, r"going on after step [1-9]")
    kill(again)


@pytest.mark.slow
def test_a_node_that_ends_before_ppo_ends_the_other(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path / "run", "--dataset_name", "no/such data")
    assert all(run.wait(timeout=90) != 0 for run in nodes)
    assert "no/such data" in log_of(tmp_path / "run")


@pytest.mark.slow
def test_a_stage_alone_is_shared_whatever_else_the_run_has_done(one: Path, tmp_path: Path) -> None:
    """Each by its own recipe, and once more when it is done."""
    folder = tmp_path / "run"
    for stage in ("reward", "sft", "ppo", "merge", "compare", "reward", "sft", "ppo", "compare"):
        run = started(folder, 2, "--ppo.total_steps", "5", recipe=f"recipes/{stage}_lora.py")
        assert run.wait(timeout=200) == 0, log_of(folder)
    assert "done before: accuracy" in log_of(folder) and "done before: 5 steps" in log_of(folder)
    assert log_of(folder).count("win rate vs") == 2  # the table of the arms
    assert_equal_to(one, folder)


@pytest.mark.slow
def test_two_processes_overwrite_a_finished_run(one: Path, tmp_path: Path) -> None:
    """The second one must not take the old summary for the new one's."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(one), str(folder)], check=True)
    run = started(folder, 2, "--ppo.total_steps", "5", "--overwrite_output_dir")
    assert run.wait(timeout=300) == 0, log_of(folder)
    assert_equal_to(one, folder)


class OtherProcess(Processes):
    """One that is not the main one, which has sent it these scales."""

    def __init__(self, scales: dict[str, ScoreScale]) -> None:
        super().__init__()
        self.rank, self.scales = 1, scales

    def from_main(self, value: Any) -> Any:
        return self.scales


def test_score_scales_are_the_main_processs(make_trainer: MakeTrainer) -> None:
    """A reward need not say the same twice: it is not asked again."""
    asked = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        asked.extend(completions)
        return [1.0] * len(completions)

    scales = {"function": ScoreScale(3.0, 0.5)}
    trainer = make_trainer(reward, processes=OtherProcess(scales))
    assert trainer.reward.scales == scales and asked == []


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6", "recvValue failed: Broken pipe",
        "Timed out waiting 600000ms for recv operation to complete", "NCCL communicator was aborted on rank 1",
    ],
)  # fmt: skip
def test_another_process_that_is_gone_is_said(text: str) -> None:
    with pytest.raises(UserError, match="another process of this run has ended or hangs"), words_for_the_lost():
        raise RuntimeError(text)
    with pytest.raises(UserError, match="has ended"), words_for_the_lost():
        raise torch.distributed.DistStoreError("wait timeout after 600000ms, keys: /0")
    with pytest.raises(RuntimeError, match="shape"), words_for_the_lost():
        raise RuntimeError("shape mismatch")


def test_a_process_that_prints_nothing_prints_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise UserError("something is wrong here")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console, "quiet", True)
    with pytest.raises(SystemExit) as stop:
        run_recipe(fails)
    assert stop.value.code == 2
    assert "process 1: error: something is wrong here" in capsys.readouterr().out


def test_rows_are_split_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 5):
        parts = []
        for rank in range(count):
            monkeypatch.setenv("WORLD_SIZE", str(count))
            monkeypatch.setenv("RANK", str(rank))
            parts.append(Processes())
        for total in (1, 2, 3, 7, 12):
            sampled = [row for p in parts for row in range(total)[p.rows(total)]]
            copies = 1 if total >= count else count  # too few to split: everyone samples all
            assert sorted(sampled) == sorted([*range(total)] * copies)
            batch = torch.randperm(total)
            learned = torch.cat([p.learned_rows(batch) for p in parts])
            assert sorted(learned.tolist()) == list(range(total))
            for p in parts:
                own = list(range(total)[p.rows(total)])
                mine = p.learned_rows(torch.arange(total))
                assert [own[i] for i in p.own_number(mine, total).tolist()] == mine.tolist()
