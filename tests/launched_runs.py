"""Runs of several processes, started as a user starts them, and the adapters that they leave."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from recipe_runs import ROOT, TINY
from safetensors.torch import load_file

ADAPTERS = ("reward_adapter", "instruct_adapter", "policy_adapter", "value_adapter")
UNEVEN = [
    *("--max_train_pairs", "21", "--max_eval_pairs", "15", "--compare.num_prompts", "7"),
    *("--reward.per_device_train_batch_size", "4", "--reward.gradient_accumulation_steps", "3"),
    *("--sft.per_device_train_batch_size", "4", "--sft.gradient_accumulation_steps", "2"),
    *("--ppo.batch_size", "6", "--ppo.micro_batch_size", "2", "--ppo.learning_rate", "3e-4"),
]
"""The tiny run in numbers that two processes cannot halve: a last micro-batch of one pair, minibatches of 3 answers."""


def launched(
    folder: Path, launcher: list[str], *options: str, recipe: str = "recipes/direct_rlhf_lora.py"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launcher, recipe, *options, "--output_dir", str(folder)]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def started(
    folder: Path, processes: int, *options: str, recipe: str = "recipes/direct_rlhf_lora.py"
) -> subprocess.Popen[bytes]:
    """Start a run of one process, or of two by the launch file that comes with the recipes."""
    launcher = [] if processes == 1 else accelerate("two_gpus", free_port())
    return launched(folder, launcher, *TINY, *UNEVEN, *options, recipe=recipe)


def accelerate(name: str, port: int, *options: str) -> list[str]:
    file = f"recipes/launch/{name}.yaml"
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", str(port), *options]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def workers(run: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that do the work of a run that was launched, the first one first."""
    listing = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(run.pid)]
    lines = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.splitlines()
    return sorted(int(line.split()[0]) for line in lines if "--output_dir" in line)


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


def wait_for_checkpoint(run: subprocess.Popen[bytes], folder: Path, stage: str) -> None:
    """Wait until the run in `folder` has a checkpoint in `checkpoints/STAGE`."""
    end = time.monotonic() + 200
    while not list((folder / "checkpoints" / stage).glob("step_*")):
        assert run.poll() is None and time.monotonic() < end, log_of(folder)
        time.sleep(0.02)


def wait_for_line(run: subprocess.Popen[bytes], folder: Path, pattern: str) -> None:
    """Wait until the run in `folder` has printed what `pattern` finds."""
    end = time.monotonic() + 200
    while not re.search(pattern, log_of(folder)):
        assert run.poll() is None and time.monotonic() < end, log_of(folder)
        time.sleep(0.05)


def adapters(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in names or ADAPTERS
        for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
    }


def assert_same_adapters(one: Path, other: Path, *names: str) -> None:
    expected, found = adapters(one, *names), adapters(other, *names)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert all(tensor.any() for name, tensor in expected.items() if "lora_B" in name)  # they have learned
