"""Everything a PPO run needs to go on as if it had never stopped, in files that hold numbers and nothing that runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from lora_rlhf.checkpoint_folders import readable
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import check_checkpoint_config, config_to_mapping, lasting_fields
from lora_rlhf.ppo.optimization import LossScale, load_adam
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import ScoreScale
from lora_rlhf.run import package_versions

STATE, PARAMETERS, OPTIMIZER, RANDOM = (
    "state.json",
    "parameters.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
)
WITHIN_LIMIT = "within_limit.safetensors"
"""The parameters that `ppo.max_kl` may go back to, where there are any."""
METRICS = "metrics.jsonl"


def write_trainer(trainer: PpoTrainer, config: RunConfig, metrics_file: Path, folder: Path) -> None:
    """Write the state of `trainer` after a step into `folder`, with the metrics so far."""
    save_file(_numbered(trainer.parameters), folder / PARAMETERS)
    if trainer.within_limit.step:
        save_file(_numbered(trainer.within_limit.parameters), folder / WITHIN_LIMIT)
    tensors, others = _split(trainer.optimizer.state_dict()["state"])
    save_file(tensors, folder / OPTIMIZER)
    save_file(_random_tensors(trainer.generator), folder / RANDOM)
    shutil.copyfile(metrics_file, folder / METRICS)
    state = {
        "step": trainer.step_count,
        "episodes": trainer.episodes,
        "stopped_early": trainer.stopped_early,
        "order": trainer._order,
        "kl_coef": trainer.kl.coef,
        "scales": {name: asdict(scale) for name, scale in trainer.reward.scales.items()},
        "value_offset": trainer.value_offset,
        "expand_weights": trainer.sampling.expand_weights,
        "batch_sizes": trainer.batches.sizes,
        "guards": asdict(trainer.guards),
        "within_limit": {"step": trainer.within_limit.step, "kl": trainer.within_limit.kl},
        "loss_scale": asdict(trainer.loss_scale),
        "scheduler": trainer.scheduler.state_dict(),
        "optimizer_groups": _plain_groups(trainer.optimizer),
        "optimizer_numbers": others,
        "python_random": random.getstate(),
        "numpy_random": _numpy_state(),
        "config": lasting_fields(config_to_mapping(config), ["ppo"]),
        "versions": package_versions(),
    }
    (folder / STATE).write_text(json.dumps(state, default=_no_json) + "\n", encoding="utf-8")


def read_state(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Return the numbers of a checkpoint.

    Raises:
        UserError: it cannot be read, or is of another config; the fields that differ are named.
    """
    with readable(folder / STATE):
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        held = dict(state["config"])
        scales_of(state)
    check_checkpoint_config(held, config, "ppo", folder)
    return state


def scales_of(state: Mapping[str, Any]) -> dict[str, ScoreScale]:
    """Return the score scales of a checkpoint: a trainer that has them does not measure them again."""
    return {name: ScoreScale(**scale) for name, scale in state["scales"].items()}


def restore_trainer(trainer: PpoTrainer, state: Mapping[str, Any], folder: Path) -> None:
    """Bring a trainer, newly made from the same config and with the scales of `state`, to where the checkpoint was.

    Raises:
        UserError: a file cannot be read, or does not fit.
    """
    found = {}
    with readable(folder / STATE):
        kept = [WITHIN_LIMIT] if state["within_limit"]["step"] else []
    for name in (PARAMETERS, OPTIMIZER, RANDOM, *kept):
        with readable(folder / name):
            found[name] = load_file(folder / name)
    with readable(folder / STATE):
        _restore(trainer, state, found)


def _restore(trainer: PpoTrainer, state: Mapping[str, Any], found: Mapping[str, dict[str, torch.Tensor]]) -> None:
    held = found[PARAMETERS]
    with torch.no_grad():
        for role, own in trainer.parameters.items():
            for i, parameter in enumerate(own):
                parameter.copy_(held[f"{role}.{i}"])
    optimizer = trainer.optimizer.state_dict()
    optimizer["state"] = _joined(found[OPTIMIZER], state["optimizer_numbers"])
    for group, kept in zip(optimizer["param_groups"], state["optimizer_groups"], strict=True):
        group |= {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    load_adam(trainer.optimizer, optimizer)
    trainer.scheduler.load_state_dict(dict(state["scheduler"]))
    trainer.step_count, trainer.episodes = state["step"], state["episodes"]
    trainer.stopped_early, trainer._order = state["stopped_early"], state["order"]
    trainer.kl.coef, trainer.value_offset = state["kl_coef"], state["value_offset"]
    trainer.sampling = replace(trainer.sampling, expand_weights=state["expand_weights"])
    trainer.batches.sizes |= state["batch_sizes"]
    trainer.guards = type(trainer.guards)(**state["guards"])
    if WITHIN_LIMIT in found:
        held = found[WITHIN_LIMIT]
        copies = {r: [held[f"{r}.{i}"] for i in range(len(own))] for r, own in trainer.parameters.items()}
        trainer.within_limit.keep(copies, state["within_limit"]["step"], state["within_limit"]["kl"])
    if "loss_scale" in state:  # not in checkpoints that were written before there was one
        trainer.loss_scale = LossScale(**state["loss_scale"])
    random_tensors = found[RANDOM]
    trainer.generator.set_state(random_tensors["sampling"])
    torch.set_rng_state(random_tensors["torch"])
    if torch.cuda.is_available() and f"cuda.{torch.cuda.device_count() - 1}" in random_tensors:
        torch.cuda.set_rng_state_all([random_tensors[f"cuda.{i}"] for i in range(torch.cuda.device_count())])
    version, numbers, gauss = state["python_random"]
    random.setstate((version, tuple(numbers), gauss))
    kept = state["numpy_random"]
    numpy.random.set_state(("MT19937", numpy.array(kept["keys"], numpy.uint32), *kept["rest"]))


def _numbered(parameters: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of each role in main memory, by `ROLE.NUMBER`."""
    named = {f"{role}.{i}": p for role, own in parameters.items() for i, p in enumerate(own)}
    return {name: p.detach().cpu().contiguous() for name, p in named.items()}


def _random_tensors(sampling: torch.Generator) -> dict[str, torch.Tensor]:
    found = {"sampling": sampling.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _numpy_state() -> dict[str, Any]:
    _, keys, *rest = numpy.random.get_state(legacy=True)
    return {"keys": [int(key) for key in keys], "rest": rest}


def _plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of the optimizer's groups, which the schedule changes, without the parameters."""
    groups = optimizer.state_dict()["param_groups"]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _split(state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, everything else) of an optimizer's state, by `NUMBER.NAME`."""
    flat: dict[str, Any] = {}
    for number, own in state.items():
        for name, value in own.items():
            inner = value if isinstance(value, dict) else {name: value}  # bitsandbytes wraps what is in 8 bits
            flat |= {f"{number}.{inner_name}": inner_value for inner_name, inner_value in inner.items()}
    tensors = {n: v.detach().cpu().contiguous().clone() for n, v in flat.items() if isinstance(v, torch.Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _joined(tensors: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **others}.items():
        number, _, field = name.partition(".")
        state.setdefault(int(number), {})[field] = value
    return state


def _no_json(value: Any) -> Any:
    raise TypeError(f"a checkpoint holds plain numbers and texts, not {type(value).__name__}")
