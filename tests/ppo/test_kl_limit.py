"""Where the KL passes `ppo.max_kl`, PPO ends with the last policy that was within it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer, same, text_length, weights

from lora_rlhf.config import RunConfig
from lora_rlhf.ppo.checkpoint import read_state, restore_trainer, scales_of, write_trainer
from lora_rlhf.ppo.kl_limit import PolicyWithinLimit
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.processes import Processes

NAN = float("nan")


def measuring(trainer: PpoTrainer, kls: Sequence[float]) -> PpoTrainer:
    """Let the answers of each step measure this KL, whatever the policy is."""
    plain = trainer._scored

    def scored(*args: Any) -> Any:
        found, lengths = plain(*args), args[0].action_mask.sum(1, keepdim=True)
        found.reference = (found.logprobs - kls[trainer.step_count] / lengths) * args[0].action_mask
        return found

    trainer._scored = scored  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(
    ("kls", "back_to", "said"),
    [
        ([1.0, 3.0, 2.0, 9.0], 3, "at step 4; the policy kept is the one that step 3 began with, at KL 2.0"),
        ([1.0, 4.0, NAN, 9.0], 2, "at step 4; the policy kept is the one that step 2 began with, at KL 4.0"),
        ([4.9, 9.0], 1, "at step 2; the policy kept is the one that step 1 began with, at KL 4.9"),
        ([9.0], 1, "at step 1; that policy is kept, for no earlier one is known to be within it"),
    ],
    ids=["last step within", "a step without KL between", "first step within", "none"],
)
@pytest.mark.parametrize("value_model", ["adapter", "head"])
def test_the_step_that_passes_the_limit_teaches_nothing_and_the_last_policy_within_comes_back(
    make_trainer: MakeTrainer, value_model: str, kls: list[float], back_to: int, said: str
) -> None:
    trainer = measuring(make_trainer(text_length, max_kl=5.0, value_model=value_model, max_stopped_updates=None), kls)
    began_with, metrics = [], []
    for _ in kls:
        assert trainer.stopped_early is None
        began_with.append(weights(trainer))
        metrics.append(trainer.step())
    assert trainer.stopped_early == f"KL per answer 9.0 passed ppo.max_kl 5 {said}"
    assert same(weights(trainer), began_with[back_to - 1])
    assert all(not same(one, other) for one, other in pairwise(began_with)) or NAN in kls
    assert metrics[-1]["kl"] == pytest.approx(9.0, rel=1e-4) and metrics[-1]["back_to_step"] == back_to
    assert not {"policy_loss", "grad_norm", "update_stopped"} & metrics[-1].keys()
    assert all("back_to_step" not in m for m in metrics[:-1])


@pytest.mark.parametrize("limit", [5.0, None])
def test_a_policy_at_the_limit_or_without_one_goes_on(make_trainer: MakeTrainer, limit: float | None) -> None:
    trainer = make_trainer(text_length, max_kl=limit)
    assert not trainer._passes_limit(5.0) and not trainer._passes_limit(NAN)
    assert trainer.within_limit.step == (0 if limit is None else 1)
    assert trainer._passes_limit(5.001) == (limit is not None)


def test_the_copy_is_in_main_memory_and_made_once(make_trainer: MakeTrainer) -> None:
    trainer, kept = make_trainer(text_length), PolicyWithinLimit()
    kept.keep(trainer.parameters, 1, 0.5)
    places = [t.data_ptr() for own in kept.parameters.values() for t in own]
    before = weights(trainer)
    with torch.no_grad():
        for own in trainer.parameters.values():
            for parameter in own:
                parameter.add_(1.0)
    kept.restore(trainer.parameters)
    assert same(weights(trainer), before)
    kept.keep(trainer.parameters, 2, 0.7)
    assert (kept.step, kept.kl) == (2, 0.7)
    assert [t.data_ptr() for own in kept.parameters.values() for t in own] == places
    assert {t.device.type for own in kept.parameters.values() for t in own} == {"cpu"}


class SecondProcess(Processes):
    """One that is not the main one, which measured another KL."""

    def __init__(self, kl: float) -> None:
        super().__init__()
        self.kl = kl

    def from_main(self, value: Any) -> Any:
        return self.kl if isinstance(value, float) else value


def test_all_processes_go_by_the_kl_that_the_main_one_measured(make_trainer: MakeTrainer) -> None:
    """Sums over a batch may differ in their last bit between two cards."""
    trainer = measuring(make_trainer(text_length, max_kl=5.0, processes=SecondProcess(5.1)), [4.9])
    assert trainer.step()["kl"] == 5.1 and trainer.stopped_early


def saved(trainer: PpoTrainer, config: RunConfig, folder: Path) -> Path:
    (folder / "metrics.jsonl").touch()
    (folder / "step").mkdir()
    write_trainer(trainer, config, folder / "metrics.jsonl", folder / "step")
    return folder / "step"


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_resumed_run_goes_back_to_the_same_policy(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path, steps: int
) -> None:
    config, kls, options = make_config(), [1.0, 3.0, 4.0, 9.0], {"max_kl": 5.0, "total_steps": 9}
    whole = measuring(make_trainer(text_length, **options), kls)
    for _ in range(steps):
        whole.step()
    folder = saved(whole, config, tmp_path)
    for _ in kls[steps:]:
        whole.step()
    state = read_state(folder, config)
    resumed = measuring(make_trainer(text_length, seed=3, scales=scales_of(state), **options), kls)
    restore_trainer(resumed, state, folder)
    for _ in kls[steps:]:
        resumed.step()
    assert resumed.stopped_early == whole.stopped_early and "step 3 began with, at KL 4.0" in str(whole.stopped_early)
    assert same(weights(whole), weights(resumed))


def test_without_a_limit_nothing_is_copied(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    trainer, config = make_trainer(text_length, max_kl=None), make_config()
    trainer.step()
    folder = saved(trainer, config, tmp_path)
    assert not trainer.within_limit.parameters and not (folder / "within_limit.safetensors").exists()
    assert json.loads((folder / "state.json").read_text())["within_limit"]["step"] == 0
    restore_trainer(trainer, read_state(folder, config), folder)
