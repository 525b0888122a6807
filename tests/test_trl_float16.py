"""Reward and SFT training in float16: as in float32, and overflows are the loss scale's business up to a bound."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from recipe_runs import TINY, assert_one_line_of_error
from safetensors.torch import load_file

from lora_rlhf import trl_trainer

Recipe = Callable[..., tuple[int, str]]
STAGES = {"reward_lora.py": "reward_adapter", "sft_lora.py": "instruct_adapter"}
STEPS = ["--reward.max_steps", "10", "--sft.max_steps", "10", "--save_steps", "0"]


def trained(recipe: Recipe, stage: str, dtype: str, folder: Path) -> tuple[torch.Tensor, str]:
    """All B of the adapter that a stage trains, which begin at 0, and what the stage printed."""
    status, printed = recipe(stage, *TINY, *STEPS, "--dtype", dtype, "--output_dir", str(folder))
    assert status == 0 and "is skipped" not in printed, printed
    adapter = load_file(folder / STAGES[stage] / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for name, tensor in sorted(adapter.items()) if "lora_B" in name]), printed


def scales_of_steps(monkeypatch: pytest.MonkeyPatch, first: float) -> list[float]:
    """Let the loss scale begin at `first`; return what it is at each step, once the steps are taken."""
    seen: list[float] = []
    plain = trl_trainer._Guarding.on_pre_optimizer_step

    def watched(self: Any, *args: Any, **rest: Any) -> None:
        seen.append(self.trainer.accelerator.scaler.get_scale())
        plain(self, *args, **rest)

    monkeypatch.setattr(trl_trainer._Guarding, "on_pre_optimizer_step", watched)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=first))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_learnt_in_float16_is_nearer_to_float32_than_in_bfloat16(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    exact, coarse = (trained(recipe, stage, dtype, tmp_path / dtype)[0] for dtype in ("float32", "bfloat16"))
    scales = scales_of_steps(monkeypatch, 2.0**10)
    fine, _ = trained(recipe, stage, "float16", tmp_path / "float16")
    assert scales == [2.0**10] * 10
    assert (fine - exact).norm() < (coarse - exact).norm()
    assert torch.nn.functional.cosine_similarity(fine, exact, dim=0) > 0.98


def test_overflows_in_a_row_are_not_counted_as_faults(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than `max_skipped_steps` allows; each halves the scale."""
    scales = scales_of_steps(monkeypatch, 2.0**25)
    learnt, printed = trained(recipe, "sft_lora.py", "float16", tmp_path)
    assert learnt.any()
    assert printed.count("a gradient overflowed float16 at the loss scale 3.35544e+07, which is halved") == 1
    assert not (tmp_path / "skipped").exists()
    assert scales[:5] == [2.0**25, 2.0**24, 2.0**23, 2.0**22, 2.0**21]
    assert len(scales) == 10 and scales[-1] == scales[-2]


def test_what_is_not_finite_at_scale_1_either_is_counted(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = scales_of_steps(monkeypatch, 4.0)
    plain = trl_trainer._Guarding._training_step

    def broken(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        loss = plain(self, model, inputs, *rest)
        next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(trl_trainer._Guarding, "_training_step", broken)
    found = recipe("sft_lora.py", *TINY, *STEPS, "--dtype", "float16", "--output_dir", str(tmp_path))
    assert_one_line_of_error(
        *found, "instruct step 6: gradient is NaN or infinite, and so it was in the 3 steps before"
    )
    assert scales == [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("stage", "name"),
    [pytest.param("reward_lora.py", "reward", marks=pytest.mark.slow), ("sft_lora.py", "instruct")],
)
def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale_and_keeps_the_scale(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    """A smaller loss scale would help nothing; the step is skipped and written down, as in other dtypes."""
    scales = scales_of_steps(monkeypatch, 4.0)
    trainer, calls = (trl.RewardTrainer if name == "reward" else transformers.Trainer), itertools.count(1)
    plain = trainer.compute_loss

    def broken(*args: Any, **options: Any) -> Any:
        loss = plain(*args, **options)
        return loss * float("nan") if next(calls) == 3 else loss

    monkeypatch.setattr(trainer, "compute_loss", broken)
    status, printed = recipe(stage, *TINY, *STEPS, "--dtype", "float16", "--output_dir", str(tmp_path))
    assert status == 0, printed
    assert printed.count("is skipped") == printed.count("step 3 is skipped: loss is NaN or infinite") == 1
    assert "overflowed" not in printed and scales == [4.0] * 10
    record = json.loads((tmp_path / "skipped" / f"{name}_000003.json").read_text())
    assert record["stage"] == name and record["batches"]
