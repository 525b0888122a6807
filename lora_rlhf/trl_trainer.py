"""What the two TRL trainers (reward and SFT) share: arguments, float32 adapters, and our progress bar."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import TrainerCallback

from lora_rlhf.base.attention import use_grouped_attention
from lora_rlhf.base.loading import device
from lora_rlhf.base.role_layers import RoleLayers
from lora_rlhf.config import RunConfig, TrainerSettings
from lora_rlhf.terminal import note, progress


def trainer_arguments(config: RunConfig, settings: TrainerSettings, scratch: str) -> dict[str, Any]:
    """Return the arguments both trainers are given; nothing is saved by the trainer itself."""
    return {
        "output_dir": scratch,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "warmup_steps": settings.warmup_ratio,
        "lr_scheduler_type": "linear",
        "weight_decay": settings.weight_decay,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": config.dtype == "bfloat16",
        "use_cpu": device().type == "cpu",
        "seed": config.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
    }


def on_one_device(arguments: Any) -> Any:
    """Return TrainingArguments that use the device of the base alone, whatever other GPUs are visible."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def trl_run(trainer: Any, name: str, config: RunConfig) -> None:
    """Train with a progress bar, in lean layers, after undoing TRL's cast of QLoRA adapters to bfloat16.

    At the learning rates of LoRA, Adam's updates are lost in bfloat16's 8 bits of mantissa.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for callback in ("PrinterCallback", "ProgressCallback"):
        for listed in list(trainer.callback_handler.callbacks):
            if type(listed).__name__ == callback:
                trainer.remove_callback(listed)
    use_grouped_attention(trainer.model.get_base_model())
    layers = RoleLayers(trainer.model, lambda: "default", getattr(torch, config.dtype))
    wanted = config.ppo.expand_weights
    held = layers.working_copy() if layers.expands(wanted) else contextlib.nullcontext()
    with held, progress(f"{name}: optimizer steps", 0) as report:
        trainer.add_callback(_Bar(report, name))
        trainer.train()
    trainer.model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Bar(TrainerCallback):
    def __init__(self, report: Any, name: str) -> None:
        self.report, self.name = report, name

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = {k: float(v) for k, v in (logs or {}).items() if k in ("loss", "accuracy", "mean_token_accuracy")}
        if "loss" in shown:
            text = "  ".join(f"{k} {v:.3f}" for k, v in shown.items())
            note(f"  step {state.global_step}/{state.max_steps}  {text}")
