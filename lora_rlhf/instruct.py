"""The Instruct arm: SFT on the chosen answers with TRL's SFTTrainer, as a LoRA adapter on the same base."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from lora_rlhf.base.adapters import base_identity, lora_config, write_adapter
from lora_rlhf.base.devices import device
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import answer_ids, prompt_ids
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.processes import Processes
from lora_rlhf.trl_trainer import checkpoints_beside, on_own_device, trainer_arguments, trl_run


def train_instruct_adapter(
    config: RunConfig, tokenizer: Any, pairs: Sequence[PreferencePair], folder: Path, processes: Processes
) -> None:
    """Fine-tune on the chosen answers (the loss is on answer tokens only); the first process writes it to `folder`.

    The processes share the training: they are connected, and hidden from libraries.
    """
    from datasets import Dataset
    from trl import SFTConfig

    rows = []
    for pair in pairs:
        prompt, answer = prompt_ids(tokenizer, pair.messages), answer_ids(tokenizer, pair.chosen)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    torch.manual_seed(config.seed)
    model = load_causal_lm(config)
    identity = base_identity(model)
    arguments = trainer_arguments(config, config.sft, checkpoints_beside(folder))
    trainer = _sft_trainer_class()(
        model=model,
        args=on_own_device(lambda: SFTConfig(**arguments, max_length=None)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(config.lora),
    )
    trl_run(trainer, "instruct", config, processes)
    if processes.is_main:
        state = get_peft_model_state_dict(trainer.model)
        write_adapter(folder, trainer.model.peft_config["default"], state, None, identity)


def _sft_trainer_class() -> Any:
    """Return TRL's SFTTrainer; off CUDA, or without Triton, with transformers' loss for its fused kernel."""
    from transformers import Trainer
    from trl import SFTTrainer

    if device().type == "cuda" and importlib.util.find_spec("triton") is not None:
        return SFTTrainer

    class PlainLossTrainer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, return_outputs, **rest)

    return PlainLossTrainer
