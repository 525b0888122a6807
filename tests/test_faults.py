"""Faults in a whole run: what is written stays, and the same command ends it as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import TINY, assert_one_line_of_error, in_stage, outcome
from safetensors.torch import load_file

from lora_rlhf.base.shared import SharedBase
from lora_rlhf.checkpoint_folders import step_folders
from lora_rlhf.evaluation.preference import last_step
from lora_rlhf.ppo.trainer import PpoTrainer

Recipe = Callable[..., tuple[int, str]]
STEPS = ["--ppo.total_steps", "4", "--save_steps", "1"]


@pytest.fixture
def trained(run_folder: Path, tmp_path: Path) -> Path:
    """A run whose stages before PPO are finished."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("reward_adapter", "instruct_adapter"):
        os.system(f"cp -r '{run_folder / name}' '{folder}'")
    summary = json.loads((run_folder / "summary.json").read_text())
    summary = {
        "seconds": {stage: 1.0 for stage in ("base", "reward", "instruct")},
        "reward_model": summary["reward_model"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    text = (run_folder / "config.yaml").read_text().replace("total_steps: 3", "total_steps: 4")
    (folder / "config.yaml").write_text(text)
    return folder


def ppo(recipe: Recipe, folder: Path, *options: str) -> tuple[int, str]:
    return recipe("ppo_lora.py", *TINY, *STEPS, "--output_dir", str(folder), *options)


def policy(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy_adapter" / "adapter_model.safetensors")


@pytest.fixture
def expected(recipe: Recipe, trained: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The policy of a run without faults."""
    os.system(f"cp -r '{trained}' '{tmp_path / 'whole'}'")
    status, printed = ppo(recipe, tmp_path / "whole")
    assert status == 0, printed
    return policy(tmp_path / "whole")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def failing_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> pytest.MonkeyPatch:
    plain = PpoTrainer.step

    def broken(self: PpoTrainer) -> Any:
        if self.step_count + 1 == step:
            raise error
        return plain(self)

    monkeypatch.setattr(PpoTrainer, "step", broken)
    return monkeypatch


def test_a_crash_in_a_step_costs_that_step_alone(
    recipe: Recipe, trained: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, 3, RuntimeError("the driver has failed"))
        with pytest.raises(RuntimeError, match="driver"):
            ppo(recipe, trained)
    status, printed = ppo(recipe, trained)
    assert status == 0 and "going on after step 2" in printed
    assert_same(policy(trained), expected)


def test_a_crash_after_the_last_step_costs_none(
    recipe: Recipe, trained: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where no checkpoint was asked for."""
    steps = [*STEPS, "--save_steps", "0", "--save_minutes", "0"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_rlhf.stages.write_curves", full)
        found = recipe("ppo_lora.py", *TINY, *steps, "--output_dir", str(trained))
    assert_one_line_of_error(*found, "No space left on device", "make room")
    status, printed = recipe("ppo_lora.py", *TINY, *steps, "--output_dir", str(trained))
    assert status == 0 and "going on after step 4" in printed
    assert_same(policy(trained), expected)


def test_memory_that_runs_out_in_a_step_changes_no_number(
    recipe: Recipe, trained: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failed = SharedBase.hidden, []

    def full(self: SharedBase, role: str, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if (
            torch.is_grad_enabled()
            and len(ids) > 2
            and self.layers.frozen[next(iter(self.layers.frozen))].copy is not None
        ):
            failed.append(len(ids))
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, role, ids, *rest)

    monkeypatch.setattr(SharedBase, "hidden", full)
    status, printed = ppo(recipe, trained)
    assert status == 0 and failed, printed
    assert "out of memory: from here on without the 16-bit working copy" in printed
    for name, tensor in expected.items():
        torch.testing.assert_close(policy(trained)[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.AcceleratorError("CUDA error: out of memory"), id="GPU"),
        pytest.param(MemoryError(), id="main"),
    ],
)
def test_memory_that_runs_out_in_other_stages_is_said(
    recipe: Recipe, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Where something else held the memory, the same command ends the run as if nothing had happened."""
    run = tmp_path / "run"

    def happens() -> None:
        raise error

    for stage in ("base", "reward", "instruct", "merge", "compare"):
        with in_stage(monkeypatch, stage, happens):
            found = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
        assert_one_line_of_error(*found, f"the {stage} stage ran out of memory", "lora_rlhf.memory", "goes on")
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run))
    assert status == 0, printed
    assert outcome(run) == outcome(run_folder)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    recipe: Recipe, trained: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_rlhf.checkpoint_folders as folders

    plain = folders.sync

    def full(path: Path) -> None:
        if ".step_000002" in str(path) or ".step_000003" in str(path):
            raise OSError(28, "No space left on device")
        plain(path)

    monkeypatch.setattr(folders, "sync", full)
    status, printed = ppo(recipe, trained)
    assert status == 0, printed
    assert printed.count("could not be written: No space left on device; the run goes on") == 2
    assert_same(policy(trained), expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("stage", "weights"),
    [
        pytest.param("ppo_lora.py", "policy_adapter/adapter_model.safetensors", marks=pytest.mark.slow),
        pytest.param("reward_lora.py", "reward_adapter/adapter_model.safetensors", marks=pytest.mark.slow),
        ("merge_lora.py", "merged/model.safetensors"),
    ],
)
def test_a_disk_that_is_really_full(
    recipe: Recipe, run_folder: Path, trained: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch,
    stage: str, weights: str,
) -> None:  # fmt: skip
    """It fills up at some byte of the run's files; with room again, the same command ends the run."""
    monkeypatch.setattr("lora_rlhf.run.SPACE_OF_A_STAGE", 0)
    monkeypatch.setattr("lora_rlhf.checkpoint_folders.BYTES_OF_A_NUMBER", 0)
    monkeypatch.setattr("lora_rlhf.merge.MergedWeights.total_bytes", 0)
    if stage == "merge_lora.py":
        trained = run_folder
    if stage == "reward_lora.py":
        (trained / "summary.json").unlink()
        subprocess.run(["rm", "-r", str(trained / "reward_adapter"), str(trained / "instruct_adapter")], check=True)
    steps = [] if stage == "merge_lora.py" else STEPS
    folder, whole = small_disk / "run", trained.parent / f"whole {stage}"
    for copy in (folder, whole):
        subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
        if stage == "merge_lora.py":
            subprocess.run(["rm", "-r", str(copy / "merged")], check=True)
            summary = json.loads((copy / "summary.json").read_text())
            del summary["seconds"]["merge"]
            (copy / "summary.json").write_text(json.dumps(summary))
    assert recipe(stage, *TINY, *steps, "--output_dir", str(whole))[0] == 0
    ballast, failed = small_disk / "ballast", 0
    for free in (2_000, 40_000, 90_000, 150_000, 300_000, 450_000, 600_000):
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - free))
        status, printed = recipe(stage, *TINY, *steps, "--output_dir", str(folder))
        assert status in (0, 2) and "Traceback" not in printed, printed
        failed += status == 2
        if status == 0:
            break
    ballast.unlink(missing_ok=True)
    status, printed = recipe(stage, *TINY, *steps, "--output_dir", str(folder))
    assert status == 0 and failed >= 2, printed
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_is_read_only(recipe: Recipe, trained: Path, small_disk: Path, begun: bool) -> None:
    folder = small_disk / "run"
    if begun:
        subprocess.run(["cp", "-r", str(trained), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = sorted(small_disk.rglob("*"))
    assert_one_line_of_error(*ppo(recipe, folder), "output_dir", str(folder), "Read-only file system")
    assert sorted(small_disk.rglob("*")) == before


def test_a_full_disk_at_the_start_is_said_before_any_work(
    recipe: Recipe, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    assert_one_line_of_error(*ppo(recipe, trained), "0 MiB free", "the ppo stage needs about 64", "make room")


@pytest.mark.parametrize("kind", ["torn", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    recipe: Recipe, trained: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, 4, RuntimeError("stop"))
        with pytest.raises(RuntimeError):
            ppo(recipe, trained)
    parent = trained / "checkpoints" / "ppo"
    assert sorted(step for step, _ in step_folders(parent)) == [2, 3]
    file = parent / "step_000003" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "torn":
        file.write_bytes(content[:-1])
    else:
        content[-5] ^= 4
        file.write_bytes(content)
    status, printed = ppo(recipe, trained)
    assert status == 0, printed
    assert "step_000003 is damaged (optimizer.safetensors" in printed and "going on after step 2" in printed
    assert_same(policy(trained), expected)


def test_a_nan_is_skipped_written_down_and_the_run_goes_on(
    recipe: Recipe, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PpoTrainer.targets

    def broken(self: PpoTrainer, *args: Any) -> Any:
        advantages, returns = plain(self, *args)
        return (advantages * float("nan") if self.step_count == 1 else advantages), returns

    monkeypatch.setattr(PpoTrainer, "targets", broken)
    status, printed = ppo(recipe, trained)
    assert status == 0, printed
    assert "step 2 is skipped: gradient is NaN or infinite" in printed
    record = json.loads((trained / "skipped" / "step_000002.json").read_text(encoding="utf-8"))
    assert record["step"] == 2 and record["seed"] == 0 and len(record["pairs"]) == len(record["answers"]) == 8
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert ["skipped" in line for line in lines] == [False, True, False, False]


def test_a_run_past_max_kl_leaves_the_policy_of_the_last_step_within_and_says_so(
    recipe: Recipe, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, kls = PpoTrainer._scored, [1.0, 2.0, 9.0]

    def measured(self: PpoTrainer, rollout: Any, chosen: Any) -> Any:
        found, lengths = plain(self, rollout, chosen), rollout.action_mask.sum(1, keepdim=True)
        found.reference = (found.logprobs - kls[self.step_count] / lengths) * rollout.action_mask
        return found

    monkeypatch.setattr(PpoTrainer, "_scored", measured)
    with monkeypatch.context() as patch:
        failing_at(patch, 3, RuntimeError("the driver has failed"))
        with pytest.raises(RuntimeError, match="driver"):
            ppo(recipe, trained, "--ppo.max_kl", "5")
    status, printed = ppo(recipe, trained, "--ppo.max_kl", "5")
    assert status == 0, printed
    said = "passed ppo.max_kl 5 at step 3; the policy kept is the one that step 2 began with, at KL 2.0"
    assert said in " ".join(printed.split())
    assert said in json.loads((trained / "summary.json").read_text())["ppo"]["stopped_early"]
    kept = sorted(folder.name for folder in (trained / "policy_snapshots").iterdir())
    assert kept == ["step_000001"], "what step 2 began with is Plus; what it left was past the limit"
    assert last_step(trained) == 1
    assert_same(policy(trained), load_file(trained / "policy_snapshots" / kept[0] / "adapter_model.safetensors"))


@pytest.mark.slow
def test_a_checkpoint_whose_json_was_swapped_for_a_pickle_runs_nothing(
    recipe: Recipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with a manifest that fits."""
    import pickle

    from lora_rlhf.checkpoint_folders import write_manifest

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "marker"),))

    for name in (
        "state.json",
        "parameters.safetensors",
        "optimizer.safetensors",
        "within_limit.safetensors",
        "random.safetensors",
        "metrics.jsonl",
    ):
        with monkeypatch.context() as patch:
            failing_at(patch, 3, RuntimeError("stop"))
            with pytest.raises(RuntimeError):
                ppo(recipe, trained)
        for _, folder in step_folders(trained / "checkpoints" / "ppo"):
            (folder / name).write_bytes(pickle.dumps(Evil()))
            write_manifest(folder)
        assert_one_line_of_error(*ppo(recipe, trained), f"{name}", "cannot be read", "delete")
        assert not (tmp_path / "marker").exists()
        subprocess.run(["rm", "-r", str(trained / "checkpoints")], check=True)
