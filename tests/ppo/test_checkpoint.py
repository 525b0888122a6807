"""A trainer that is restored goes on as the one that was saved would have, number for number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import MakeTrainer, same, settled, weights

from lora_rlhf.checkpoint_folders import write_checkpoint
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.checkpoint import read_state, restore_trainer, scales_of, write_trainer
from lora_rlhf.ppo.trainer import Metrics, PpoTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive KL": {"adaptive_kl": True, "kl_horizon": 20},
    "value head": {"value_model": "head"},
    "minibatches, warm-up": {"num_ppo_epochs": 2, "num_mini_batches": 2, "warmup_ratio": 0.5, "value_warmup_steps": 1},
    "16-bit copy": {"expand_weights": True},
}


def saved(trainer: PpoTrainer, config: RunConfig, folder: Path, metrics: list[Metrics]) -> Path:
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(m) + "\n" for m in metrics), encoding="utf-8")
    return write_checkpoint(
        folder / "ppo", trainer.step_count, lambda half: write_trainer(trainer, config, file, half), 2
    )


def test_moments_in_8_bits_come_back(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer of `ppo.optim: paged_adam_8bit`, which steps without CUDA too, though it does not page there."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def paged_adam(groups: list[dict[str, Any]], _: str) -> Any:
        return bitsandbytes.optim.PagedAdam8bit(groups, eps=1e-5, min_8bit_size=1)

    monkeypatch.setattr("lora_rlhf.ppo.trainer.adam", paged_adam)
    test_a_restored_trainer_goes_on_number_for_number(make_trainer, make_config, tmp_path, {})
    held = load_file(tmp_path / "ppo" / "step_000002" / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in held.items() if name.endswith(".state1")} == {torch.uint8}


@pytest.mark.parametrize("ppo", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_restored_trainer_goes_on_number_for_number(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path, ppo: dict[str, Any]
) -> None:
    config = make_config()
    one = make_trainer(total_steps=5, **ppo)
    first = [one.step() for _ in range(2)]
    folder = saved(one, config, tmp_path, first)
    expected = [settled(one.step()) for _ in range(3)]

    for own in (random, numpy.random, torch):
        getattr(own, "manual_seed", own.seed)(99)
    state = read_state(folder, config)
    other = make_trainer(seed=7, scales=scales_of(state), total_steps=5, **ppo)
    assert not same(weights(one), weights(other))
    restore_trainer(other, state, folder)
    assert (other.step_count, other.episodes) == (2, 8)
    assert [settled(other.step()) for _ in range(3)] == expected
    assert same(weights(one), weights(other))
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == first


def test_every_random_state_comes_back(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.step()
    random.seed(5), numpy.random.seed(6), torch.manual_seed(7)
    folder = saved(trainer, make_config(), tmp_path, [])
    expected = random.random(), numpy.random.rand(), torch.rand(1).item(), numpy.random.randn()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    restore_trainer(trainer, read_state(folder, make_config()), folder)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item(), numpy.random.randn()) == expected


def test_a_checkpoint_holds_numbers_and_nothing_that_runs(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.step()
    folder = saved(trainer, make_config(), tmp_path, [])
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            assert load_file(file)
        else:
            assert file.suffix in (".json", ".jsonl") and [json.loads(line) for line in [file.read_text() or "0"]]


def test_a_checkpoint_of_another_config_says_which_fields_differ(
    make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    folder = saved(make_trainer(), config, tmp_path, [])
    other = replace(config, seed=3, ppo=replace(config.ppo, kl_coef=0.7))
    with pytest.raises(UserError, match=r"another config: ppo\.kl_coef, seed differ"):
        read_state(folder, other)
    may_change = replace(config, save_steps=1, save_minutes=0.0, save_total_limit=9, output_dir="elsewhere")
    assert read_state(folder, may_change)["step"] == 0
