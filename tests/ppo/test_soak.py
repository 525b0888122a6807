"""Three hundred steps with checkpoints leave memory, files and threads as they were."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from trainer_cases import MakeTrainer

from lora_rlhf.checkpoint_folders import write_checkpoint
from lora_rlhf.config import RunConfig
from lora_rlhf.memory_peak import return_freed_memory
from lora_rlhf.ppo.checkpoint import write_trainer


@pytest.mark.slow
def test_three_hundred_steps(make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    process, config = psutil.Process(), make_config()
    trainer = make_trainer(total_steps=300)
    metrics = tmp_path / "metrics.jsonl"
    held: list[tuple[float, int, int]] = []
    for step in range(300):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trainer.step()) + "\n")
        if step % 10 == 0:
            write_checkpoint(tmp_path / "ppo", step, lambda half: write_trainer(trainer, config, metrics, half), 2)
        if step in (49, 299):
            gc.collect()
            return_freed_memory()
            held.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    (before, files, threads), (after, files_then, threads_then) = held
    print(f"resident memory {before / 2**20:.1f} MiB after 50 steps, {after / 2**20:.1f} MiB after 300")
    assert after < 1.02 * before
    assert (files_then, threads_then) == (files, threads)
