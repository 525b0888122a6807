"""Part 6: one optimizer step each of reward and SFT training; TRL's fused loss runs on cards alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from card_parts.bench import Bench, Figures
from card_parts.models import mistral_config, random_causal_lm, write_model
from lora_rlhf.base.adapters import WEIGHTS
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_mapping
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.instruct import _sft_trainer_class, train_instruct_adapter
from lora_rlhf.memory_peak import reset_peak_memory
from lora_rlhf.processes import Processes
from lora_rlhf.reward.training import train_reward_adapter

PAIRS = 16


def training(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield seconds and peak of a step of each of TRL's trainers, on a model of four layers."""
    model = bench.folder / "trained"
    write_model(random_causal_lm(bench, mistral_config(bench, *bench.size.check)), bench.tokenizer, model)
    section = {"max_steps": 1, "per_device_train_batch_size": 4, "warmup_ratio": 0.0}
    values = {
        "model_name_or_path": str(model), "dataset_name": ["embedded"], "output_dir": str(bench.folder / "training"),
        "chat_template": "human_assistant", "max_prompt_length": 256, "max_length": 512, "save_steps": 0,
        "save_minutes": 0.0, "reward": section, "sft": section, "ppo": {"expand_weights": False},
    }  # fmt: skip
    config = config_from_mapping(values, "training")
    tokenizer = load_tokenizer(config)
    pairs = preference_pairs(config, tokenizer, "train")[0][:PAIRS]
    step = partial(one_step, bench, config, tokenizer, pairs)
    yield "reward", bench.attempt(partial(step, train_reward_adapter, "reward_adapter"))
    sft = bench.attempt(partial(step, train_instruct_adapter, "instruct_adapter"))
    fused = _sft_trainer_class().__name__ == "SFTTrainer"
    yield "sft", sft | {"loss": "TRL's own" if fused else "transformers' (TRL's fused one needs CUDA and Triton)"}


def one_step(
    bench: Bench,
    config: RunConfig,
    tokenizer: Any,
    pairs: list[PreferencePair],
    train: Callable[..., None],
    name: str,
) -> Figures:
    """Return seconds and peak of a training of one step, loading and compiling included, and whether it moved."""
    folder = bench.folder / "training" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    reset_peak_memory(bench.device)
    started = time.perf_counter()
    train(config, tokenizer, pairs, folder, Processes.one())
    bench.synchronize()
    seconds = time.perf_counter() - started
    weights = load_file(folder / WEIGHTS)
    moved = max(w.abs().max().item() for n, w in weights.items() if "lora_B" in n)
    finite = all(bool(torch.isfinite(w).all()) for w in weights.values())
    return {"seconds": seconds, **bench.peaks_gib(), "largest_lora_b": moved, "right": finite and moved > 0}
