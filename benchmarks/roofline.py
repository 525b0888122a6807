"""One PPO step of a config by count: the least seconds on a named card, and where they go. Nothing is run on a card.

    python benchmarks/roofline.py --config recipes/configs/mistral_7b_24gb.yaml --card rtx4090
    python benchmarks/roofline.py --config recipes/configs/mistral_7b_24gb.yaml --card rtx4090 --json
    python benchmarks/roofline.py --config recipes/configs/mistral_7b_24gb.yaml --card h100 --ppo.value_model head

The step's own code runs on tensors that have a shape and no numbers, and every operation is noted: its kernels, the
bytes that it reads and writes, and the floating-point operations of products. An operation takes at least its bytes
over the card's bandwidth, or its arithmetic over the card's rate, whichever is longer. The sum is a lower bound for
prompts and answers that are as long as the config allows, of which one prompt is padded. With --json the last line is
JSON: the whole step (`seconds_per_step`, `peak_gib`), its phases, and each kind of operation. Any field of the config
can be given.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

from rich.table import Table

from lora_rlhf.config_file import config_from_command_line
from lora_rlhf.memory import GIB, usable_bytes, with_checkpointing_decided
from lora_rlhf.memory_plan import expands
from lora_rlhf.model_shape import model_shape
from lora_rlhf.roofline.cards import CARDS, Card, card_named, check_dtype
from lora_rlhf.roofline.hours import realistic_seconds, with_copy_decided
from lora_rlhf.roofline.phases import Phase, ppo_phases
from lora_rlhf.terminal import console, run_recipe

FIGURES = ("seconds", "gigabytes", "teraflops", "kernels")


def by_phase(phases: list[Phase], card: Card) -> list[dict[str, Any]]:
    """Return the figures of each phase, in the order of the step."""
    return [
        {
            "stage": phase.stage,
            "phase": phase.name,
            "times": phase.times,
            "seconds": phase.seconds(card),
            "realistic_seconds": realistic_seconds(phase, card),
            "gigabytes": phase.times * sum(one.bytes for one in phase.operations) / 1e9,
            "teraflops": phase.times * sum(one.flops for one in phase.operations) / 1e12,
            "kernels": sum(one.kernels for one in phase.operations),
            "syncs": dict(phase.syncs),
            "peak_gib": phase.peak_bytes / GIB,
        }
        for phase in phases
    ]


def by_kind(phases: list[Phase], card: Card) -> dict[str, dict[str, float]]:
    """Return the figures of each stage and kind of operation over the whole step, the longest first."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(FIGURES, 0.0))
    for phase in phases:
        for one in phase.operations:
            kind = sums[f"{phase.stage}: {one.kind}"]
            kind["seconds"] += phase.times * one.seconds(card.bandwidth, card.matmul)
            kind["gigabytes"] += phase.times * one.bytes / 1e9
            kind["teraflops"] += phase.times * one.flops / 1e12
            kind["kernels"] += phase.times * one.kernels
    return dict(sorted(sums.items(), key=lambda item: -item[1]["seconds"]))


def table(title: str, rows: list[list[str]], columns: list[str]) -> Table:
    """Return a table whose first column is text."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="rtx4090", help=f"one of {', '.join(CARDS)} [rtx4090]")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    given, rest = parser.parse_known_args()
    card = card_named(given.card)
    config = config_from_command_line(__doc__, rest)
    check_dtype(card, config.dtype)
    config = with_checkpointing_decided(config, card.memory_gib)
    usable, on_cuda = usable_bytes(card.memory_gib)
    config = with_copy_decided(config, expands(config, model_shape(config), on_cuda, usable))
    phases = ppo_phases(config, card)
    parts, kinds = by_phase(phases, card), by_kind(phases, card)
    seconds, peak = sum(part["seconds"] for part in parts), max(part["peak_gib"] for part in parts)
    rows = [
        [f"{p['stage']}: {p['phase']}", f"{p['times']:g}", f"{p['seconds']:.2f}", f"{p['gigabytes']:,.0f}",
         f"{p['teraflops']:,.0f}", f"{p['kernels']:,}", f"{sum(p['syncs'].values())}", f"{p['peak_gib']:.2f}"]
        for p in parts
    ]  # fmt: skip
    columns = ["phase", "times", "s at best", "GB", "TFLOP", "kernels, once", "waits, once", "peak GiB"]
    console.print(table(f"one PPO step of {config.model_name_or_path} on {card.name}, by count", rows, columns))
    rows = [[name, *(f"{kind[figure]:,.2f}" for figure in FIGURES)] for name, kind in kinds.items()]
    console.print(table("by kind of operation", rows, ["kind", *FIGURES]))
    checkpointing = "with" if config.ppo.gradient_checkpointing else "without"
    console.print(f"{seconds:.1f} s at best, {peak:.1f} GiB at the peak, {checkpointing} gradient checkpointing")
    if given.json:
        figures = {"card": card.name, "seconds_per_step": seconds, "peak_gib": peak, "phases": parts, "kinds": kinds}
        print(json.dumps(figures))


if __name__ == "__main__":
    run_recipe(main)
