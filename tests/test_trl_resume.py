"""Reward and SFT training: they go on from their checkpoints, bit for bit, and leave out steps with NaN."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import TINY, assert_one_line_of_error
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_rlhf import checkpoint_folders, trl_trainer

Recipe = Callable[..., tuple[int, str]]
STAGES = {"reward_lora.py": "reward_adapter", "sft_lora.py": "instruct_adapter"}
EITHER = [pytest.param("reward_lora.py", marks=pytest.mark.slow), "sft_lora.py"]
"""The two share what is tested with these: every day with the faster one."""
STEPS = ["--reward.max_steps", "10", "--sft.max_steps", "10"]  # of 4 in a pass


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("save_steps", "crash_step", "from_step"), [(3, 8, 6), pytest.param(4, 6, 4, marks=pytest.mark.slow)]
)
def test_training_goes_on_where_it_was(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    save_steps: int,
    crash_step: int,
    from_step: int,
) -> None:
    weights = Path(STAGES[stage]) / "adapter_model.safetensors"
    status, printed = recipe(stage, *TINY, *STEPS, "--save_steps", "0", "--output_dir", str(tmp_path / "whole"))
    assert status == 0, printed

    options = [*TINY, *STEPS, "--save_steps", str(save_steps), "--output_dir", str(tmp_path / "run")]
    crash(recipe, monkeypatch, crash_step, stage, *options)
    assert not (tmp_path / "run" / weights).exists()
    status, printed = recipe(stage, *options)
    assert status == 0, printed
    assert f"going on after optimizer step {from_step}, from" in printed
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not (tmp_path / "run" / "checkpoints" / STAGES[stage]).exists()


class Killed(BaseException):
    """What nothing catches, as if the process were gone."""


def crash_at(monkeypatch: pytest.MonkeyPatch, steps: dict[int, Callable[[], None]]) -> None:
    """Let something happen at the beginning of steps, which are counted from 0."""

    def begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps.get(state.global_step, lambda: None)()

    monkeypatch.setattr(trl_trainer._Bar, "on_step_begin", begin, raising=False)


def driver_fails() -> None:
    raise RuntimeError("the driver has failed")


def crash(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int, stage: str, *options: str) -> None:
    """Let a run end by a failing driver at the beginning of a step."""
    with monkeypatch.context() as patch:
        crash_at(patch, {step: driver_fails})
        with pytest.raises(RuntimeError, match="driver"):
            recipe(stage, *options)


@pytest.mark.parametrize("stage", EITHER)
def test_a_half_written_checkpoint_is_passed_over(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed while the checkpoint of step 6 was being written."""
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        plain = checkpoint_folders.write_manifest

        def killed(folder: Path) -> None:
            if folder.name == ".step_000006.part":
                raise Killed
            plain(folder)

        patch.setattr(checkpoint_folders, "write_manifest", killed)
        with pytest.raises(Killed):
            recipe(stage, *options)
    status, printed = recipe(stage, *options)
    assert status == 0, printed
    assert "going on after optimizer step 3" in printed


@pytest.mark.parametrize("stage", EITHER)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    crash(recipe, monkeypatch, 7, stage, *options)
    folder = tmp_path / "run" / "checkpoints" / STAGES[stage]
    with (folder / "step_000006" / "optimizer.pt").open("ab") as file:
        file.write(b"x")
    status, printed = recipe(stage, *options)
    assert status == 0, printed
    assert "step_000006 is damaged (optimizer.pt has" in printed and "; step_000003 is used" in printed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_files_swapped_for_pickles_run_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Even with a manifest that fits."""

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "marker"),))

    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    crash(recipe, monkeypatch, 4, stage, *options)
    folder = tmp_path / "run" / "checkpoints" / STAGES[stage] / "step_000003"
    names = sorted(file.name for file in folder.iterdir())
    assert "training_args.bin" not in names
    read = [name for name in names if name.endswith((".pt", ".pth", ".safetensors")) or name == "trainer_state.json"]
    assert len(read) == 6
    for name in [*read, "config.json"]:
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Evil()))
        checkpoint_folders.write_manifest(folder)
        assert_one_line_of_error(*recipe(stage, *options), f"{name} cannot be read", "delete")
        (folder / name).write_bytes(held)
    assert not (tmp_path / "marker").exists()
    checkpoint_folders.write_manifest(folder)
    assert recipe(stage, *options)[0] == 0


@pytest.mark.parametrize("stage", EITHER)
def test_settings_of_a_stage_that_is_not_finished_may_change(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """But not from a checkpoint that was made with others."""
    section = stage.removesuffix("_lora.py")
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    crash(recipe, monkeypatch, 4, stage, *options)
    options += [f"--{section}.learning_rate", "1e-5", "--save_steps", "4"]
    found = recipe(stage, *options)
    assert_one_line_of_error(*found, f"another config: {section}.learning_rate differ", "Delete")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / STAGES[stage])
    status, printed = recipe(stage, *options)
    assert status == 0, printed
    found = recipe(stage, *options, f"--{section}.learning_rate", "1e-4")
    assert_one_line_of_error(*found, f"differs in {section}.learning_rate")  # now it is finished


@pytest.mark.parametrize("stage", EITHER)
@pytest.mark.parametrize(("first", "then", "expected"), [(2, 100, [2, 4, 10]), (100, 2, [5, 6, 8, 10])])
def test_save_steps_may_change(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, first: int, then: int,
    expected: list[int],
) -> None:  # fmt: skip
    saved = []
    plain = trl_trainer.write_checkpoint

    def remember(parent: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        return plain(parent, step, *rest)

    monkeypatch.setattr(trl_trainer, "write_checkpoint", remember)
    options = [*TINY, *STEPS, "--output_dir", str(tmp_path / "run"), "--save_steps"]
    with monkeypatch.context() as patch:
        if first == 100:
            crash_at(patch, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
            assert recipe(stage, *options, str(first))[0] == 130
        else:
            crash(recipe, monkeypatch, 5, stage, *options, str(first))
    assert recipe(stage, *options, str(then))[0] == 0
    assert saved == expected


@pytest.mark.parametrize("stage", EITHER)
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
        "manifest": ("lora_rlhf.checkpoint_folders.write_manifest", full),
    }
    name, error = writers[broken]

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        crash_at(patch, {5: lambda: patch.setattr(name, fails), 7: driver_fails})
        with pytest.raises(RuntimeError, match="driver"):
            recipe(stage, *options)
    kept = (tmp_path / "run" / "checkpoints" / STAGES[stage]).iterdir()
    assert [folder.name for folder in kept] == ["step_000003"]
    status, printed = recipe(stage, *options)
    assert status == 0 and "going on after optimizer step 3, from" in printed, printed


def test_a_save_that_fails_is_said_and_the_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folders, "write_manifest", full)
    status, printed = recipe(
        "reward_lora.py", *TINY, *STEPS, "--save_steps", "5", "--output_dir", str(tmp_path / "run")
    )
    assert status == 0
    assert "step_000005 could not be written: No space left on device; the run goes on" in printed
    assert (tmp_path / "run" / "reward_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stage", EITHER)
def test_a_checkpoint_is_due_by_the_clock_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saved = []

    def remember(parent: Path, step: int, *_: Any) -> Path:
        saved.append(step)
        return parent

    monkeypatch.setattr(trl_trainer, "write_checkpoint", remember)
    options = [*TINY, *STEPS, "--save_steps", "0", "--output_dir", str(tmp_path / "run"), "--save_minutes"]
    assert recipe(stage, *options, "1e-6")[0] == 0
    assert saved[:9] == list(range(1, 10))
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


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("stage", EITHER)
def test_too_many_steps_with_nan_end_the_run_and_leave_finite_checkpoints(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    section = stage.removesuffix("_lora.py")
    options = [*TINY, *STEPS, "--output_dir", str(tmp_path), f"--{section}.max_skipped_steps", "1"]
    with monkeypatch.context() as patch:
        break_gradients(patch, {4, 5}, math.nan)
        found = recipe(stage, *options)
    assert_one_line_of_error(*found, "step 5: gradient is NaN or infinite", f"{section}.learning_rate", "skipped")
    kept = tmp_path / "checkpoints" / STAGES[stage] / "step_000004" / "adapter_model.safetensors"
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
