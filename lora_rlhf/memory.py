"""Will it fit? The predicted peak memory of every stage of a run, before anything is loaded.

    python -m lora_rlhf.memory --config recipes/configs/mistral_7b_24gb.yaml --gpu-gib 24
    python -m lora_rlhf.memory --config recipes/configs/mistral_7b_24gb.yaml --gpu-gib 16 --ppo.micro_batch_size 2

Without --gpu-gib: this machine, its first card or its main memory. Any field of the config can be given, as recipes
take them. Where a stage does not fit, the settings to change are named, the cheapest first. Status 1: it does not fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import psutil
import torch
from rich.table import Table

from lora_rlhf.base.loading import device
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_command_line
from lora_rlhf.errors import UserError
from lora_rlhf.memory_plan import CONTEXT_BYTES, Planner, StagePlan, fitting_changes, model_shape, peaks
from lora_rlhf.terminal import console, note, run_recipe

GIB = 2**30
USABLE = 0.96
"""Share of a card that can be filled: the rest is lost between blocks."""


def usable_bytes(gpu_gib: float | None = None) -> tuple[float, bool]:
    """Return (bytes that a run may take, whether they are a card's).

    Args:
        gpu_gib: size of a card; none: this machine's first card, or its free main memory.
    """
    if gpu_gib is None and device().type == "cuda":
        fraction = torch.cuda.get_per_process_memory_fraction(device())
        gpu_gib = fraction * torch.cuda.get_device_properties(device()).total_memory / GIB
    if gpu_gib is not None:
        return USABLE * gpu_gib * GIB - CONTEXT_BYTES, True
    own = psutil.Process().memory_info().rss  # the plans count this process too
    return float(psutil.virtual_memory().available + own), False


def memory_table(plans: list[StagePlan], usable: float) -> Table:
    """Return the table of all stages (columns) and parts (rows), in GiB."""
    parts = list(dict.fromkeys(part for plan in plans for part in plan.parts))
    table = Table(title=f"predicted peak memory in GiB, of {usable / GIB:.1f}", title_justify="left")
    table.add_column("part")
    for plan in plans:
        table.add_column(plan.name, justify="right")
    for part in parts:
        table.add_row(part, *(f"{p.parts[part] / GIB:.2f}" if part in p.parts else "" for p in plans))
    table.add_section()
    table.add_row("peak", *(f"{plan.total / GIB:.2f}" for plan in plans))
    table.add_row("fits", *("yes" if plan.total <= usable else "NO" for plan in plans))
    return table


def advice(config: RunConfig, plans: list[StagePlan], usable: float, on_cuda: bool) -> str | None:
    """Return what to change so that the run fits; none where it fits."""
    worst = max(plans, key=lambda plan: plan.total)
    if worst.total <= usable:
        return None
    said = f"{worst.name} takes {worst.total / GIB:.1f} GiB at its peak, and there are {usable / GIB:.1f}"
    changes = fitting_changes(config, model_shape(config), on_cuda, usable)
    if changes is None:
        return f"{said}. No change of settings makes this model fit; a smaller one, or more memory, is needed"
    return f"{said}. This fits: " + " ".join(f"--{name} {str(value).lower()}" for name, value in changes)


def check_memory(config: RunConfig) -> None:
    """Raise `UserError` where a run cannot fit on this machine, before anything is loaded."""
    usable, on_cuda = usable_bytes()
    config = with_checkpointing_decided(config)
    plans = peaks(config, model_shape(config), on_cuda, usable)
    if wrong := advice(config, plans, usable, on_cuda):
        raise UserError(f"memory: {wrong}. python -m lora_rlhf.memory shows all of it")
    merging, free = merge_bytes(config, on_cuda), psutil.virtual_memory().available
    if on_cuda and merging > free:  # on a CPU it is one of the stages above
        raise UserError(
            f"memory: the merge stage takes {merging / GIB:.1f} GiB of main memory beside the card's, and "
            f"{free / GIB:.1f} are free: end what else takes it"
        )


def merge_bytes(config: RunConfig, on_cuda: bool) -> float:
    """Return the main memory that the merge stage takes beside the base, in bytes."""
    return Planner(config, model_shape(config), on_cuda, expand=False).merge_bytes()


def with_checkpointing_decided(config: RunConfig, gpu_gib: float | None = None) -> RunConfig:
    """Return `config` with PPO's gradient checkpointing on or off: on where it would not fit without."""
    if config.ppo.gradient_checkpointing is not None:
        return config
    usable, on_cuda = usable_bytes(gpu_gib)
    # where the copy is a free choice, it goes before time is spent on recomputing
    copied = config.ppo.expand_weights if config.ppo.expand_weights is not None else False
    without = replace(config, ppo=replace(config.ppo, gradient_checkpointing=False, expand_weights=copied))
    update = next(p for p in peaks(without, model_shape(config), on_cuda, usable) if p.name == "ppo: update")
    return replace(config, ppo=replace(config.ppo, gradient_checkpointing=update.total > usable))


def main() -> None:
    """Be the command."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_rlhf.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu-gib", type=float, help="size of the card; without it, this machine is asked")
    given, rest = parser.parse_known_args()
    if given.gpu_gib is not None and not given.gpu_gib > 0:
        raise UserError(f"--gpu-gib is above 0, not {given.gpu_gib}")
    if not any(word.split("=")[0] in ("--config", "--model_name_or_path") for word in rest):
        raise UserError("--config FILE is needed, or --model_name_or_path NAME: which run is it about?")
    config = with_checkpointing_decided(config_from_command_line(__doc__, rest), given.gpu_gib)
    usable, on_cuda = usable_bytes(given.gpu_gib)
    plans = peaks(config, model_shape(config), on_cuda, usable)
    console.print(memory_table(plans, usable))
    if wrong := advice(config, plans, usable, on_cuda):
        note(wrong)
        sys.exit(1)
    spare = usable - max(plan.total for plan in plans)
    checkpointing = ", PPO with gradient checkpointing" if config.ppo.gradient_checkpointing else ""
    note(f"fits, with {spare / GIB:.1f} GiB to spare{checkpointing}")
    if on_cuda:
        note(f"the merge also takes {merge_bytes(config, on_cuda) / GIB:.1f} GiB of main memory")


if __name__ == "__main__":
    run_recipe(main)
