"""Will it fit, and how long will it take? The predicted peak memory of every stage, before anything is loaded.

    python -m lora_rlhf.memory --config recipes/configs/mistral_7b_24gb.yaml --gpu-gib 24
    python -m lora_rlhf.memory --config recipes/configs/mistral_7b_24gb.yaml --gpu-gib 16 --ppo.micro_batch_size 2
    python -m lora_rlhf.memory --config recipes/configs/mistral_7b_24gb.yaml --card rtx4090

Without --gpu-gib or --card: this machine, its first card or its main memory. Any field of the config can be given, as
recipes take them. Where a stage does not fit, the settings to change are named, the cheapest first. Status 1: it does
not fit. With --card the hours of every stage follow, counted operation by operation and not measured (half a minute),
and the cards that the run fits on. The models and data sets of the shipped configs need no network for this.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import psutil
import torch
from rich.table import Table

from lora_rlhf.base.devices import device
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_command_line
from lora_rlhf.errors import UserError
from lora_rlhf.free_memory import free_bytes
from lora_rlhf.memory_advice import fitting_changes
from lora_rlhf.memory_plan import CONTEXT_BYTES, Planner, StagePlan, expands, peaks
from lora_rlhf.model_shape import ModelShape, model_shape
from lora_rlhf.roofline.cards import CARDS, Card, card_named, check_dtype
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
    return free_bytes(torch.device("cpu")) + own, False


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


def weights_left_whole(config: RunConfig, shape: ModelShape) -> str | None:
    """Return what is said where most weights of a 4-bit base are not in 4 bits; None where they are."""
    if not config.load_in_4bit or shape.other <= shape.body:
        return None
    size = shape.other * getattr(torch, config.dtype).itemsize
    return (
        f"only {shape.body / (shape.body + shape.other):.0%} of the weights are in 4 bits: what is no linear layer "
        f"(stacked experts, embeddings) stays whole and takes {size / GIB:.2f} GiB"
    )


def check_memory(config: RunConfig) -> None:
    """Raise `UserError` where a run cannot fit on this machine, before anything is loaded."""
    usable, on_cuda = usable_bytes()
    config = with_checkpointing_decided(config)
    plans = peaks(config, model_shape(config), on_cuda, usable)
    if wrong := advice(config, plans, usable, on_cuda):
        raise UserError(f"memory: {wrong}. python -m lora_rlhf.memory shows all of it")
    merging, free = merge_bytes(config, on_cuda), free_bytes(torch.device("cpu"))
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
    parser.add_argument("--card", help=f"a card by name, for its memory and hours: {', '.join(CARDS)}")
    parser.add_argument("--pairs", type=int, help="training pairs, where --card cannot know how many the data has")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON: bytes and seconds of each stage")
    given, rest = parser.parse_known_args()
    for name in ("gpu_gib", "pairs"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is above 0, not {getattr(given, name)}")
    if not any(word.split("=")[0] in ("--config", "--model_name_or_path") for word in rest):
        raise UserError("--config FILE is needed, or --model_name_or_path NAME: which run is it about?")
    if given.card and given.gpu_gib is not None:
        raise UserError("--card brings its own memory: leave --gpu-gib out, or --card")
    card = card_named(given.card) if given.card else None
    size = card.memory_gib if card else given.gpu_gib
    undecided = config_from_command_line(__doc__, rest)
    if card:
        check_dtype(card, undecided.dtype)
    config = with_checkpointing_decided(undecided, size)
    usable, on_cuda = usable_bytes(size)
    shape = model_shape(config)
    plans = peaks(config, shape, on_cuda, usable)
    console.print(memory_table(plans, usable))
    wrong = advice(config, plans, usable, on_cuda)
    spare = usable - max(plan.total for plan in plans)
    checkpointing = ", PPO with gradient checkpointing" if config.ppo.gradient_checkpointing else ""
    note(wrong or f"fits, with {spare / GIB:.1f} GiB to spare{checkpointing}")
    if left := weights_left_whole(config, shape):
        note(left)
    merging = merge_bytes(config, on_cuda)
    if on_cuda:
        note(f"the merge also takes {merging / GIB:.1f} GiB of main memory")
    figures: dict[str, Any] = {
        "usable_bytes": usable,
        "fits": not wrong,
        "peak_bytes": {p.name: p.total for p in plans},
        "main_memory_of_merge": merging,
    }
    if card:
        figures["cards_that_fit"] = fitting = cards_that_fit(undecided)
        note(f"fits on {', '.join(CARDS[name].name for name in fitting) or 'none of the cards that are known'}")
        figures["hours"] = print_hours(config, card, given.pairs, expands(config, shape, on_cuda, usable))
    if given.json:
        print(json.dumps(figures))
    if wrong:
        sys.exit(1)


def cards_that_fit(config: RunConfig) -> list[str]:
    """Return the names of the cards that have the run's dtype and on which every stage fits.

    Args:
        config: where it leaves PPO's gradient checkpointing open, that is decided for each card.
    """
    shape = model_shape(config)
    fitting = []
    for name, card in CARDS.items():
        usable, on_cuda = usable_bytes(card.memory_gib)
        decided = with_checkpointing_decided(config, card.memory_gib)
        fits = max(plan.total for plan in peaks(decided, shape, on_cuda, usable)) <= usable
        if fits and card.computes_in(config.dtype):
            fitting.append(name)
    return fitting


def print_hours(config: RunConfig, card: Card, pairs: int | None, expand_weights: bool) -> dict[str, Any]:
    """Print how long each stage of a run takes on a card; return it as plain values."""
    from lora_rlhf.roofline.hours import REALISTIC_SHARE, hours_table, stage_times, times_as_json, with_copy_decided

    times = stage_times(with_copy_decided(config, expand_weights), card, pairs)
    console.print(hours_table(times, card))
    note(
        "All texts are taken to be as long as the config allows; shorter ones take less. At best: the card's memory "
        f"and arithmetic are never idle. Realistic: {REALISTIC_SHARE:.0%} of that speed, an assumption until a card "
        "has been measured. Merging is not counted"
    )
    return times_as_json(times)


if __name__ == "__main__":
    run_recipe(main)
