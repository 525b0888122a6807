"""Reward and SFT training: they go on from their checkpoints, bit for bit, and leave out steps with NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import TINY, assert_one_line_of_error
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_rlhf import trl_trainer

Recipe = Callable[..., tuple[int, str]]
STAGES = {"reward_lora.py": "reward_adapter", "sft_lora.py": "instruct_adapter"}
STEPS = ["--reward.max_steps", "10", "--sft.max_steps", "10"]  # of 4 in a pass


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("save_steps", "crash_at", "from_step"), [(3, 8, 6), (4, 6, 4)])
def test_training_goes_on_where_it_was(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    save_steps: int,
    crash_at: int,
    from_step: int,
) -> None:
    weights = Path(STAGES[stage]) / "adapter_model.safetensors"
    status, printed = recipe(stage, *TINY, *STEPS, "--save_steps", "0", "--output_dir", str(tmp_path / "whole"))
    assert status == 0, printed

    options = [*TINY, *STEPS, "--save_steps", str(save_steps), "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:

        def crash(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == crash_at:
                raise RuntimeError("the driver has failed")

        patch.setattr(trl_trainer._Bar, "on_step_begin", crash, raising=False)
        with pytest.raises(RuntimeError, match="driver"):
            recipe(stage, *options)
    assert not (tmp_path / "run" / weights).exists()
    status, printed = recipe(stage, *options)
    assert status == 0, printed
    assert f"going on after optimizer step {from_step}, from" in printed
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not (tmp_path / "run" / "checkpoints" / STAGES[stage]).exists()


class Killed(BaseException):
    """What nothing catches, as if the process were gone."""


def test_a_torn_checkpoint_is_passed_over(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was being written: it has no manifest yet."""
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:

        def torn(folder: Path) -> None:
            if folder.name == "checkpoint-6":
                raise Killed
            plain(folder)

        plain = trl_trainer.write_manifest
        patch.setattr(trl_trainer, "write_manifest", torn)
        with pytest.raises(Killed):
            recipe("reward_lora.py", *options)
    status, printed = recipe("reward_lora.py", *options)
    assert status == 0, printed
    assert "checkpoint-6 is damaged (it has no manifest.json: it was never finished)" in printed.replace("\n", " ")
    assert "going on after optimizer step 3" in printed


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("broken", ["adapter_model", "optimizer.pt", "trainer_state", "order", "manifest"])
def test_a_save_that_fails_costs_that_checkpoint_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, broken: str
) -> None:
    """The disk is full at one of its files; then the driver fails, and the checkpoint before is gone on from."""
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    full = OSError(28, "No space left on device")
    writers = {
        "adapter_model": ("peft.PeftModel.save_pretrained", full),
        "optimizer.pt": ("torch.save", RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos")),
        "trainer_state": ("transformers.TrainerState.save_to_json", full),
        "order": ("lora_rlhf.trl_trainer.save_file", SafetensorError("I/O error: No space left on device")),
        "manifest": ("lora_rlhf.trl_trainer.write_manifest", full),
    }
    name, error = writers[broken]

    def crash(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            patch.setattr(name, fails)
        if state.global_step == 7:
            raise RuntimeError("the driver has failed")

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(trl_trainer._Bar, "on_step_begin", crash, raising=False)
        with pytest.raises(RuntimeError, match="driver"):
            recipe(stage, *options)
    kept = (tmp_path / "run" / "checkpoints" / STAGES[stage]).glob("checkpoint-*")
    assert [folder.name for folder in kept] == ["checkpoint-3"]
    status, printed = recipe(stage, *options)
    assert status == 0 and "going on after optimizer step 3, from" in printed, printed


def test_a_save_that_fails_is_said_and_the_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trl_trainer, "write_manifest", full)
    status, printed = recipe(
        "reward_lora.py", *TINY, *STEPS, "--save_steps", "5", "--output_dir", str(tmp_path / "run")
    )
    assert status == 0
    assert "checkpoint-5 could not be written: [Errno 28] No space left on device; the run goes on" in printed
    assert (tmp_path / "run" / "reward_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_due_by_the_clock_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saved = []

    def remember(folder: Path) -> None:
        saved.append(folder.name)

    monkeypatch.setattr(trl_trainer, "write_manifest", remember)
    options = [*TINY, *STEPS, "--save_steps", "0", "--output_dir", str(tmp_path / "run"), "--save_minutes"]
    assert recipe(stage, *options, "1e-6")[0] == 0
    assert saved[:9] == [f"checkpoint-{step}" for step in range(1, 10)]
    saved.clear()
    assert recipe(stage, *options, "60", "--overwrite_output_dir")[0] == 0
    assert saved == []


def break_gradients(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Make one number of the gradient of these steps NaN or infinite."""
    plain = trl_trainer._Guarding.on_pre_optimizer_step

    def broken(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step + 1 in steps:
            learned = [p for p in self.trainer.model.parameters() if p.grad is not None]
            learned[3].grad[0, 0] = value
        plain(self, args, state, control, **rest)

    monkeypatch.setattr(trl_trainer._Guarding, "on_pre_optimizer_step", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_nan_is_left_out_and_written_down(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, value: float
) -> None:
    """Steps 1 to 3 and 5 to 7 of 10: never more than three in a row."""
    break_gradients(monkeypatch, {1, 2, 3, 5, 6, 7}, value)
    name = STAGES[stage].removesuffix("_adapter")
    status, printed = recipe(stage, *TINY, *STEPS, "--output_dir", str(tmp_path))
    assert status == 0 and printed.count("is skipped: gradient is NaN or infinite") == 6, printed
    written = sorted((tmp_path / "skipped").iterdir())
    assert [file.name for file in written] == [f"{name}_{step:06d}.json" for step in (1, 2, 3, 5, 6, 7)]
    record = json.loads(written[0].read_text(encoding="utf-8"))
    assert (record["stage"], record["step"], record["seed"]) == (name, 1, 0)
    ids = record["batches"][0]["input_ids"]
    assert len(record["batches"]) == 1 and len(ids) == (16 if name == "reward" else 8)  # chosen and rejected
    assert all(isinstance(token, int) for row in ids for token in row)


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_steps_with_nan_end_the_run_and_leave_finite_checkpoints(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    section = {"reward_lora.py": "reward", "sft_lora.py": "sft"}[stage]
    options = [*TINY, *STEPS, "--output_dir", str(tmp_path), f"--{section}.max_skipped_steps", "1"]
    with monkeypatch.context() as patch:
        break_gradients(patch, {4, 5}, math.nan)
        found = recipe(stage, *options)
    assert_one_line_of_error(*found, "step 5: gradient is NaN or infinite", f"{section}.learning_rate", "skipped")
    kept = tmp_path / "checkpoints" / STAGES[stage] / "checkpoint-4" / "adapter_model.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(kept).values())
    status, printed = recipe(stage, *options)
    assert status == 0 and "going on after optimizer step 4" in printed, printed


def test_a_skipped_step_changes_no_weight(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every step skipped, the adapter is the one that training began with."""
    break_gradients(monkeypatch, set(range(1, 11)), math.nan)
    status, printed = recipe(
        "sft_lora.py", *TINY, *STEPS, "--sft.max_skipped_steps", "none", "--output_dir", str(tmp_path)
    )
    assert status == 0, printed
    adapter = load_file(tmp_path / "instruct_adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
