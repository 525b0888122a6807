"""Reward and SFT training by two real processes: as one does it, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

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

Recipe = Callable[..., tuple[int, str]]
ADAPTER = {"reward": "reward_adapter", "sft": "instruct_adapter"}


@pytest.mark.parametrize(
    ("stage", "accumulated"),
    [
        ("reward", 1),
        pytest.param("reward", 2, marks=pytest.mark.slow),
        pytest.param("sft", 1, marks=pytest.mark.slow),
        pytest.param("sft", 3, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_adapter_of_one(recipe: Recipe, tmp_path: Path, stage: str, accumulated: int) -> None:
    """Micro-batches of 3, 3, 3 and 1 pairs, of which one process has more; what is shown is the loss of all pairs."""
    options = ["--max_train_pairs", "10", "--max_eval_pairs", "5", f"--{stage}.max_steps", "6"]
    options += [f"--{stage}.per_device_train_batch_size", "3"]
    options += [f"--{stage}.gradient_accumulation_steps", str(accumulated), "--save_steps", "0"]
    two = started(tmp_path / "two", 2, *options, recipe=f"recipes/{stage}_lora.py")
    status, printed = recipe(f"{stage}_lora.py", *TINY, *UNEVEN, *options, "--output_dir", str(tmp_path / "one"))
    assert status == 0, printed
    assert two.wait(timeout=200) == 0, log_of(tmp_path / "two")
    assert_same_adapters(tmp_path / "one", tmp_path / "two", ADAPTER[stage])
    shown = [re.findall(r"step 5/6.*|accuracy on 5.*", text) for text in (printed, log_of(tmp_path / "two"))]
    assert shown[0] == shown[1] and len(shown[0]) == (2 if stage == "reward" else 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward stage of 60 steps by one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = started(folder, 1, "--reward.max_steps", "60", recipe="recipes/reward_lora.py")
    assert run.wait(timeout=200) == 0, log_of(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 2)])
def test_reward_training_goes_on_after_a_kill(undisturbed: Path, tmp_path: Path, first: int, then: int) -> None:
    """With another number of processes; or with the same, where one of them was killed and took the other along."""
    folder = tmp_path / "run"
    options = ["--reward.max_steps", "60"]
    run = started(folder, first, *options, recipe="recipes/reward_lora.py")
    wait_for_checkpoint(run, folder, "reward_adapter")
    if first == then:
        os.kill(workers(run)[1], signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    else:
        kill(run)
    assert not (folder / "reward_adapter").exists()
    assert started(folder, then, *options, recipe="recipes/reward_lora.py").wait(timeout=200) == 0, log_of(folder)
    assert len(re.findall(r"going on after optimizer step [1-9]", log_of(folder))) == 1
    assert_same_adapters(undisturbed, folder, "reward_adapter")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "second"])
def test_sigterm_stops_all_at_one_step_with_one_checkpoint(tmp_path: Path, who: str) -> None:
    """The launcher hands a signal on to all; a system may end one of them alone."""
    folder = tmp_path / "run"
    options = ["--sft.max_steps", "5000", "--save_steps", "0", "--save_minutes", "0"]
    run = started(folder, 2, *options, recipe="recipes/sft_lora.py")
    wait_for_line(run, folder, "step 5/5000")
    os.kill(run.pid if who == "all" else workers(run)[1], signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    stopped = re.findall(r"stopped after instruct step (\d+)\.", log_of(folder))
    (checkpoint,) = (folder / "checkpoints" / "instruct_adapter").iterdir()
    assert [f"step_{int(step):06d}" for step in stopped] == [checkpoint.name], log_of(folder)
    assert "another process of this run has ended" not in log_of(folder)
    again = started(folder, 2, *options, recipe="recipes/sft_lora.py")
    wait_for_line(again, folder, f"going on after optimizer step {stopped[0]}, ")
    kill(again)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "sft"])
@pytest.mark.parametrize(("what", "dtype"), [("gradient", "float32"), ("loss", "float16")])
def test_nan_in_one_process_is_skipped_by_all(tmp_path: Path, stage: str, what: str, dtype: str) -> None:
    """In float16 the gradient's would be taken for an overflow, which the loss scale answers for; the loss's is not."""
    folder = tmp_path / "run"
    options = [what, f"recipes/{stage}_lora.py", *TINY, *UNEVEN, f"--{stage}.max_steps", "5", "--dtype", dtype]
    launcher = accelerate("two_gpus", free_port())
    run = launched(folder, launcher, *options, recipe="tests/nan_in_the_second.py")
    assert run.wait(timeout=200) == 0, log_of(folder)
    assert re.findall(r"step \d+ is skipped", log_of(folder)) == ["step 2 is skipped"]
    assert f"step 2 is skipped: {what} is NaN or infinite" in log_of(folder)
    (written,) = (folder / "skipped").iterdir()
    rows = json.loads(written.read_text(encoding="utf-8"))["batches"][0]["input_ids"]
    assert len(rows) == (8 if stage == "reward" else 4)  # of the whole batch


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "sft"])
def test_two_processes_learn_in_float16_what_one_does(recipe: Recipe, tmp_path: Path, stage: str) -> None:
    """Within float16's rounding, which depends on how the examples are put together."""
    options = ["--max_train_pairs", "10", "--max_eval_pairs", "5", f"--{stage}.max_steps", "6", "--dtype", "float16"]
    options += ["--save_steps", "0"]
    two = started(tmp_path / "two", 2, *options, recipe=f"recipes/{stage}_lora.py")
    status, printed = recipe(f"{stage}_lora.py", *TINY, *UNEVEN, *options, "--output_dir", str(tmp_path / "one"))
    assert status == 0, printed
    assert two.wait(timeout=200) == 0, log_of(tmp_path / "two")
    assert "is skipped" not in printed + log_of(tmp_path / "two")
    one, other = (adapters(tmp_path / name, ADAPTER[stage]) for name in ("one", "two"))
    learnt = [torch.cat([t.flatten() for n, t in sorted(a.items()) if "lora_B" in n]) for a in (one, other)]
    assert learnt[0].any() and torch.nn.functional.cosine_similarity(*learnt, dim=0) > 0.99
