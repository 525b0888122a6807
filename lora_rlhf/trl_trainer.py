"""What the two TRL trainers (reward and SFT) share: arguments, float32 adapters, and our progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback

from lora_rlhf.base.attention import use_grouped_attention
from lora_rlhf.base.loading import device
from lora_rlhf.base.role_layers import RoleLayers
from lora_rlhf.checkpoint_folders import newest_checkpoint, write_manifest
from lora_rlhf.config import RunConfig, TrainerSettings
from lora_rlhf.interruption import Interruption, StoppedAfterSaving, interruption
from lora_rlhf.terminal import note, progress

ORDER = "order.safetensors"


def trainer_arguments(config: RunConfig, settings: TrainerSettings, checkpoints: Path) -> dict[str, Any]:
    """Return the arguments both trainers are given.

    Args:
        config: of the run.
        settings: of the stage.
        checkpoints: folder in which the trainer keeps its checkpoints.
    """
    return {
        "output_dir": str(checkpoints),
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
        "save_strategy": "steps" if config.save_steps > 0 else "no",
        "save_steps": max(config.save_steps, 1),
        "save_total_limit": max(config.save_total_limit, 2),  # it deletes the old one before the new one is proven
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
    }


def checkpoints_beside(adapter: Path) -> Path:
    """Return the folder for the checkpoints of the training that ends in the folder `adapter`."""
    return adapter.parent / "checkpoints" / adapter.name


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
    found = newest_checkpoint(Path(trainer.args.output_dir), lambda text: note(f"  {text}"))
    if found is not None:
        note(f"  going on after optimizer step {found[0]}, from {found[1]}")
    sampler = _OrderKept(trainer._get_train_sampler())
    if found is not None and (found[1] / ORDER).is_file():
        sampler.resumed = load_file(found[1] / ORDER)["random"]
    trainer._get_train_sampler = lambda *_: sampler
    with held, interruption() as asked, progress(f"{name}: optimizer steps", 0) as report:
        trainer.add_callback(_Bar(report, name))
        trainer.add_callback(_Saving(asked, sampler))
        trainer.train(resume_from_checkpoint=None if found is None else str(found[1]))
        if asked.asked and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedAfterSaving(f"after {name} step {trainer.state.global_step}")
    trainer.model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _OrderKept(Sampler[int]):
    """The trainer's sampler, which draws the order of a pass anew from where torch's random numbers are then.

    Where a pass is gone on with, it draws from where they were when the pass began: `drawn_from`, kept in checkpoints.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.resumed: torch.Tensor | None = None
        self.drawn_from = torch.get_rng_state()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.drawn_from = torch.get_rng_state()
        if self.resumed is None:
            return iter(self.sampler)
        now, self.drawn_from, self.resumed = self.drawn_from, self.resumed, None
        torch.set_rng_state(self.drawn_from)
        order = list(self.sampler)
        torch.set_rng_state(now)
        return iter(order)


class _Saving(TrainerCallback):
    """Saves and stops when that is asked for, and writes down what a checkpoint holds once it is whole."""

    def __init__(self, asked: Interruption, sampler: _OrderKept) -> None:
        self.asked, self.sampler = asked, sampler

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked.asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.epoch % 1 > 1e-6:  # in the middle of a pass, whose order has to be drawn again
            save_file({"random": self.sampler.drawn_from}, folder / ORDER)
        write_manifest(folder)


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
