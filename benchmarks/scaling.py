"""How a PPO step grows: seconds and peak memory against batch, prompt, answer, rank and the number of steps taken.

    python benchmarks/scaling.py                          # a small random Mistral, a few minutes on two cores
    python benchmarks/scaling.py --hidden_size 512 --layers 8

Each size is doubled over a factor of 8 while the others stay. The exponent is the slope of log seconds over log size
(least squares, medians of the rounds; the rounds of all sizes are interleaved): 1 is linear. Memory over steps is the
growth of the peak between two stretches of the same run, after the first tenth. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from rich.table import Table
from shapes import trainer_of_shape

from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_mapping
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.terminal import console, progress, run_recipe

START = {"batch": 8, "prompt": 32, "response": 16, "rank": 4}
"""Sizes that are doubled three times, one at a time, from here."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the random Mistral [256]")
    parser.add_argument("--layers", type=int, default=4, help="its depth [4]")
    parser.add_argument("--rounds", type=int, default=3, help="counted steps at each size [3]")
    parser.add_argument("--steps", type=int, default=200, help="steps over which memory is watched [200]")
    return parser.parse_args()


def trainer_of_sizes(model: str, batch: int, prompt: int, response: int, rank: int) -> PpoTrainer:
    """Return a trainer whose step has these sizes; one minibatch, micro-batches of 8."""
    ppo = {
        "batch_size": batch, "response_length": response, "micro_batch_size": 8, "scoring_batch_size": 16,
        "normalization_samples": 8, "num_ppo_epochs": 1, "total_steps": 10_000, "learning_rate": 1e-6, "max_kl": None,
        "expand_weights": True, "gradient_checkpointing": False,
    }  # fmt: skip
    values: dict[str, Any] = {
        "model_name_or_path": model, "dataset_name": ["embedded"], "ppo": ppo, "max_length": 2048,
        "max_prompt_length": 1024, "lora": {"r": rank, "lora_alpha": 2 * rank},
    }  # fmt: skip
    config: RunConfig = config_from_mapping(values, "scaling")
    return trainer_of_shape(config, prompt)


def seconds_by_size(model: str, name: str, rounds: int) -> dict[int, float]:
    """Return the median seconds of a step at each size of `name`, the rounds of all sizes interleaved."""
    sizes = [START[name] * 2**k for k in range(4)]
    trainers = {size: trainer_of_sizes(model, **(START | {name: size})) for size in sizes}
    took: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step()
            if number:
                took[size].append(time.perf_counter() - started)
    return {size: median(times) for size, times in took.items()}


def growth_over_steps(model: str, steps: int) -> float:
    """Return how much more, as a share, a step takes at its peak in the last tenth of a run than in the second."""
    trainer = trainer_of_sizes(model, **START)
    device, tenth = trainer.base.device, max(1, steps // 10)
    peaks: list[float] = []
    for step in range(steps):
        if step % tenth == 0:
            reset_peak_memory(device)
        trainer.step()
        if step % tenth == tenth - 1:
            peaks.append(peak_memory_gib(device))
    return peaks[-1] / peaks[1] - 1


def main() -> None:
    given = arguments()
    table = Table(title="seconds of a PPO step, each size over a factor of 8", title_justify="left")
    for column in ("size", "1x", "2x", "4x", "8x", "exponent"):
        table.add_column(column, justify="left" if column == "size" else "right")
    exponents: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, progress("sizes", len(START) + 1) as report:
        heads = max(1, given.hidden_size // 64)
        build_tiny_model(
            Path(folder), given.hidden_size, given.layers, 8192, given.hidden_size * 3, heads=(heads, heads)
        )
        for done, name in enumerate(START, 1):
            found = seconds_by_size(folder, name, given.rounds)
            slope, _ = linear_regression([math.log(s) for s in found], [math.log(t) for t in found.values()])
            exponents[name] = round(slope, 3)
            table.add_row(f"{name} (from {START[name]})", *(f"{t:.3f}" for t in found.values()), f"{slope:.2f}")
            report(done)
        growth = growth_over_steps(folder, given.steps)
        report(len(START) + 1)
    console.print(table)
    console.print(f"peak memory over {given.steps} steps: {growth:+.2%}")
    print(json.dumps({"exponents": exponents, "memory_growth": round(growth, 5), "steps": given.steps}))


if __name__ == "__main__":
    run_recipe(main)
