"""What the two TRL trainers (reward and SFT) share: arguments, float32 adapters, checkpoints, and our progress bar."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer import safe_globals

from lora_rlhf.base.attention import use_grouped_attention
from lora_rlhf.base.devices import device
from lora_rlhf.base.role_layers import RoleLayers
from lora_rlhf.checkpoint_folders import check_space_of_checkpoint, newest_checkpoint, readable, write_checkpoint
from lora_rlhf.config import SECTIONS, RunConfig, TrainerSettings
from lora_rlhf.config_file import check_checkpoint_config, config_to_mapping, lasting_fields
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.interruption import Interruption, StoppedAfterSaving, interruption
from lora_rlhf.processes import Processes
from lora_rlhf.run import write_text
from lora_rlhf.shared_steps import SharedSteps
from lora_rlhf.terminal import note, progress

ORDER, CONFIG = "order.safetensors", "config.json"


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
        "fp16": config.dtype == "float16",
        "use_cpu": device().type == "cpu",
        "seed": config.seed,
        "save_strategy": "steps" if config.save_steps > 0 else "no",
        "save_steps": max(config.save_steps, 1),
        "save_total_limit": None,  # `_Saving` takes the old ones away, when the new one is proven
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
    }


def checkpoints_beside(adapter: Path) -> Path:
    """Return the folder for the checkpoints of the training that ends in the folder `adapter`."""
    return adapter.parent / "checkpoints" / adapter.name


def on_own_device(make_arguments: Callable[[], Any]) -> Any:
    """Return TrainingArguments that use the GPU of this process alone; by themselves they choose the first, or all."""
    own = device()
    arguments = make_arguments()
    if arguments.device.type == "cuda":  # asked for it, they make all that depends on it
        torch.cuda.set_device(own)
        arguments.__dict__["_setup_devices"] = own  # a cached property
        arguments._n_gpu = 1
    return arguments


def trl_run(trainer: Any, name: str, config: RunConfig, processes: Processes) -> None:
    """Train with a progress bar, in lean layers, after undoing TRL's cast of QLoRA adapters to bfloat16.

    At the learning rates of LoRA, Adam's updates are lost in bfloat16's 8 bits of mantissa.

    Args:
        trainer: TRL's.
        name: of the stage.
        config: of the run.
        processes: that share the training; all of them call this, with the same model, data and random state.

    Raises:
        StoppedAfterSaving: Ctrl-C or SIGTERM; a checkpoint of the last step is written.
        UserError: too many steps in a row were skipped.
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
    found = None
    if processes.is_main:
        found = newest_checkpoint(Path(trainer.args.output_dir), lambda text: note(f"  {text}"))
        if found is not None:
            _check_readable(found[1], config, name)
            note(f"  going on after optimizer step {found[0]}, from {found[1]}")
    found = processes.from_main(found)
    sampler = _OrderKept(trainer._get_train_sampler())
    if found is not None and (found[1] / ORDER).is_file():
        sampler.resumed = load_file(found[1] / ORDER)["random"]
    trainer._get_train_sampler = lambda *_: sampler
    if trainer.args.fp16 and trainer.accelerator.scaler is None:  # accelerate leaves float16 out on CPUs
        trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    saving = _Saving(trainer, sampler, config, name)
    trainer._save_checkpoint = saving if processes.is_main else lambda *_: None
    if processes.count > 1:
        SharedSteps(trainer, 2 if name == "reward" else 1, processes)
    with held, interruption() as asked, progress(f"{name}: optimizer steps", 0) as report:
        trainer.add_callback(_Bar(report, name))
        trainer.add_callback(_SavingWhenDue(asked, config.save_minutes, processes))
        trainer.add_callback(_Guarding(trainer, name, config, processes))
        trainer.train(resume_from_checkpoint=None if found is None else str(found[1]))
        step = trainer.state.global_step
        if processes.any(bool(asked.asked)):  # once the checkpoint is written: a launcher ends all where one has ended
            raise StoppedAfterSaving(name, step, saving.saved_step == step)
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


def _check_readable(folder: Path, config: RunConfig, name: str) -> None:
    """Raise `UserError` where a checkpoint is of another config, or a file cannot be read; the trainer reads them."""
    with readable(folder / CONFIG):
        held = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    check_checkpoint_config(held, config, name, folder)
    for file in sorted(folder.iterdir()):
        with readable(file), safe_globals():
            if file.suffix in (".pt", ".pth"):
                torch.load(file, map_location="cpu", weights_only=True)
            elif file.suffix == ".safetensors":
                load_file(file)
            elif file.name == "trainer_state.json":
                TrainerState.load_from_json(str(file))


class _Saving:
    """The trainer's `_save_checkpoint`, made whole or not at all.

    Where it cannot be written the run goes on, and the checkpoints before are as they were.
    """

    def __init__(self, trainer: Any, sampler: _OrderKept, config: RunConfig, name: str) -> None:
        self.trainer, self.sampler, self.config, self.name = trainer, sampler, config, name
        self.plain, self.saved_step = trainer._save_checkpoint, 0

    def __call__(self, model: Any, trial: Any) -> None:
        step, parent = self.trainer.state.global_step, Path(self.trainer.args.output_dir)
        numbers = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        try:
            check_space_of_checkpoint(parent.parents[1], step, numbers)
            write_checkpoint(parent, step, lambda half: self._write(half, model, trial), self.config.save_total_limit)
        except UserError as error:
            note(f"  no checkpoint of step {step}: {error}; the run goes on")
        else:
            self.saved_step = step

    def _write(self, half: Path, model: Any, trial: Any) -> None:
        arguments, state = self.trainer.args, self.trainer.state
        kept, arguments.output_dir = arguments.output_dir, str(half)
        try:
            self.plain(model, trial)
        except RuntimeError as error:  # torch's own writer, on a full disk
            raise OSError(first_line(error)) from None
        finally:
            arguments.output_dir = kept
        inner = half / f"checkpoint-{state.global_step}"
        for file in inner.iterdir():
            file.rename(half / file.name)
        inner.rmdir()
        (half / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
        if state.epoch % 1 > 1e-6:  # in the middle of a pass, whose order has to be drawn again
            save_file({"random": self.sampler.drawn_from}, half / ORDER)
        held = lasting_fields(config_to_mapping(self.config), [self.name])
        (half / CONFIG).write_text(json.dumps(held) + "\n", encoding="utf-8")


class _SavingWhenDue(TrainerCallback):
    """Saves after so many minutes, and saves and stops where that was asked for."""

    def __init__(self, asked: Interruption, minutes: float, processes: Processes) -> None:
        self.asked, self.minutes, self.processes = asked, minutes, processes
        self.saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps  # a checkpoint brings its own

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.processes.any(bool(self.asked.asked)):  # all of them at the same step
            control.should_save = control.should_training_stop = True
        if self.minutes > 0 and time.monotonic() - self.saved >= 60 * self.minutes:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()


class _Guarding(TrainerCallback):
    """Leaves out a step whose loss or gradient is NaN or infinite, and writes down what is needed to take it again.

    In float16 a gradient alone may also be too large for the loss scale, which is halved then: no fault.
    """

    def __init__(self, trainer: Any, name: str, config: RunConfig, processes: Processes) -> None:
        self.trainer, self.name, self.seed, self.processes = trainer, name, config.seed, processes
        self.section = SECTIONS[name]
        self.most: int | None = getattr(config, self.section).max_skipped_steps
        self.skipped = 0
        self.batches: list[dict[str, Any]] = []
        self.loss_is_finite = True
        self.overflow_noted = False
        self.kept_scale: float | None = None
        self.plain = trainer.training_step
        trainer.training_step = self._training_step

    def _training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        self.batches.append(inputs)
        loss = self.plain(model, inputs, *rest)
        self.loss_is_finite &= bool(torch.isfinite(loss).all())
        return loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches, self.loss_is_finite, self.kept_scale = [], True, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        learned = [p for p in self.trainer.model.parameters() if p.grad is not None]
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in learned])))
        # each process knows the loss of its own examples alone; the gradients are those of all
        loss_is_finite = not self.processes.any(not self.loss_is_finite)
        if finite and loss_is_finite:
            self.skipped = 0
            return
        for parameter in learned:
            parameter.grad = None  # what has none is not stepped
        scaler, step = self.trainer.accelerator.scaler, state.global_step + 1
        scale = 1.0 if scaler is None else scaler.get_scale()
        if loss_is_finite and scale > 1:
            if not self.overflow_noted:
                note(
                    f"  step {step}: a gradient overflowed float16 at the loss scale {scale:g}, which is halved; the "
                    "step changes nothing. That is no fault, and is not said again"
                )
            self.overflow_noted = True
            return
        self.skipped += 1
        self.kept_scale = None if scaler is None else scale
        folder = Path(args.output_dir).parents[1] / "skipped"
        reason = f"{'gradient' if loss_is_finite else 'loss'} is NaN or infinite"
        if self.processes.is_main:
            held = [{name: value.tolist() for name, value in batch.items()} for batch in self.batches]
            record = {"stage": self.name, "step": step, "reason": reason, "seed": self.seed, "batches": held}
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{self.name}_{step:06d}.json", json.dumps(record) + "\n")
        note(f"  step {step} is skipped: {reason}")
        if self.most is not None and self.skipped > self.most:
            raise UserError(
                f"{self.name} step {step}: {reason}, and so it was in the {self.skipped - 1} steps before: a smaller "
                f"{self.section}.learning_rate or dtype: float32 may help. The batches are in {folder}"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.kept_scale is not None:  # it is not to blame, but the scaler halves it for every NaN
            self.trainer.accelerator.scaler.update(self.kept_scale)


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
