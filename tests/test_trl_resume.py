"""Reward and SFT training go on from their checkpoints, bit for bit, in the middle of a pass and between two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import TINY

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


def test_a_torn_checkpoint_is_passed_over(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it was being written: it has no manifest yet."""
    options = [*TINY, *STEPS, "--save_steps", "3", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:

        def torn(folder: Path) -> None:
            if folder.name == "checkpoint-6":
                raise RuntimeError("killed")
            plain(folder)

        plain = trl_trainer.write_manifest
        patch.setattr(trl_trainer, "write_manifest", torn)
        with pytest.raises(RuntimeError, match="killed"):
            recipe("reward_lora.py", *options)
    status, printed = recipe("reward_lora.py", *options)
    assert status == 0, printed
    assert "checkpoint-6 is damaged (it has no manifest.json: it was never finished)" in printed.replace("\n", " ")
    assert "going on after optimizer step 3" in printed
