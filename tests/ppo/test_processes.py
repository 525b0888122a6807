"""Two processes come to what one comes to, end together, and leave a checkpoint that any number goes on from."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import ROOT, TINY
from safetensors.torch import load_file
from trainer_cases import MakeTrainer

from lora_rlhf.errors import UserError
from lora_rlhf.processes import Processes, words_for_the_lost
from lora_rlhf.reward.sources import ScoreScale
from lora_rlhf.terminal import console, run_recipe

ADAPTERS = ("reward_adapter", "instruct_adapter", "policy_adapter", "value_adapter")
PPO = [
    "--ppo.batch_size",
    "6",
    "--ppo.micro_batch_size",
    "2",
    "--ppo.learning_rate",
    "3e-4",
]  # minibatches of 3 answers


def launched(
    folder: Path, launcher: list[str], *options: str, recipe: str = "direct_rlhf_lora.py"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launcher, f"recipes/{recipe}", *TINY, *PPO, "--output_dir", str(folder)]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def started(folder: Path, processes: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a run of one process, or of two by the launch file that comes with the recipes."""
    return launched(folder, [] if processes == 1 else accelerate("two_gpus", free_port()), *options)


def accelerate(name: str, port: int, *options: str) -> list[str]:
    file = f"recipes/launch/{name}.yaml"
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", str(port), *options]


def two_nodes(folder: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """Start both on this machine, by the launch file for two, with a process each."""
    port = free_port()
    node = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--machine_rank"]
    return [launched(folder, accelerate("two_nodes", port, *node, str(rank)), *options) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def workers(run: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that do the work of a run that was launched."""
    listing = ["ps", "-o", "pid=,args=", "--ppid", str(run.pid)]
    lines = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "direct_rlhf_lora" in line]


def kill(run: subprocess.Popen[bytes]) -> None:
    """Kill the launcher, and the workers, which would go on without it."""
    processes = [*workers(run), run.pid]
    for process in processes:
        os.kill(process, signal.SIGKILL)
    run.wait()
    while any(alive(process) for process in processes):
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def log_of(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8")


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in ADAPTERS
        for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
    }


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    assert started(folder, 1, "--ppo.total_steps", "5").wait(timeout=300) == 0, log_of(folder)
    return folder


def assert_equal_to(one: Path, other: Path) -> None:
    expected, found = adapters(one), adapters(other)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 0.1 for name, tensor in expected.items() if name.startswith("policy"))
    assert steps_of(other) == [1, 2, 3, 4, 5]


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
    end = time.monotonic() + 200
    while not list((folder / "checkpoints" / "ppo").glob("step_*")) and time.monotonic() < end:
        time.sleep(0.02)
    kill(run)
    assert started(folder, then, "--ppo.total_steps", "5").wait(timeout=300) == 0, log_of(folder)
    assert_equal_to(one, folder)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = started(folder, 2, "--ppo.total_steps", "400")
    end = time.monotonic() + 200
    while not list((folder / "checkpoints" / "ppo").glob("step_*")) and time.monotonic() < end:
        time.sleep(0.05)
    both = workers(run)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert re.search("another process of this run has ended or hangs|Signal 9|SIGKILL|exitcode", log_of(folder))
    again = started(folder, 1, "--ppo.total_steps", "400")
    while not re.search(r"going on after step [1-9]", log_of(folder)):
        assert again.poll() is None and time.monotonic() < end, log_of(folder)
        time.sleep(0.05)
    kill(again)


@pytest.mark.slow
def test_a_node_that_ends_before_ppo_ends_the_other(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path / "run", "--dataset_name", "no/such data")
    assert all(run.wait(timeout=90) != 0 for run in nodes)
    assert "no/such data" in log_of(tmp_path / "run")


@pytest.mark.slow
def test_a_stage_alone_is_shared_whatever_else_the_run_has_done(tmp_path: Path) -> None:
    """`ppo_lora.py` on a reward adapter, without SFT; and once more when all is done."""
    folder = tmp_path / "run"
    reward = launched(folder, [], recipe="reward_lora.py")
    assert reward.wait(timeout=120) == 0, log_of(folder)
    for _ in range(2):
        ppo = launched(folder, accelerate("two_gpus", free_port()), recipe="ppo_lora.py")
        assert ppo.wait(timeout=120) == 0, log_of(folder)
    assert "done before: 3 steps" in log_of(folder)


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
