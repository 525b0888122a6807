"""The planner's predicted peak against the measured one, over shapes of PPO step that differ in every way.

    python benchmarks/memory.py                    # SmolLM2-135M and a small Mistral, here
    python benchmarks/memory.py --only 2 5         # some of the shapes

Each shape is measured in a process of its own, in its second PPO step. The last line is JSON: the largest relative
error, and predicted and measured GiB of each shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table
from shapes import trainer_of_shape

from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.memory import GIB, usable_bytes
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory
from lora_rlhf.memory_plan import peaks
from lora_rlhf.model_shape import model_shape
from lora_rlhf.terminal import console, progress, run_recipe

PLAIN: dict[str, Any] = {
    "batch_size": 16, "micro_batch_size": 4, "scoring_batch_size": 16, "response_length": 48, "num_ppo_epochs": 1,
    "normalization_samples": 2, "expand_weights": True, "gradient_checkpointing": False, "total_steps": 100,
    "value_model": "adapter", "max_kl": None,
}  # fmt: skip
SHAPES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("plain", "embedded", 40, 16, {}),
    ("4-bit throughout", "embedded", 40, 16, {"expand_weights": False}),
    ("value head", "embedded", 40, 16, {"value_model": "head"}),
    ("long", "embedded", 128, 16, {"response_length": 128, "batch_size": 8}),
    ("large micro-batch", "embedded", 40, 16, {"micro_batch_size": 16}),
    ("checkpointing", "embedded", 128, 16, {"gradient_checkpointing": True, "micro_batch_size": 16}),
    ("rank 64", "embedded", 40, 64, {}),
    ("wide Mistral", "1024x6", 64, 16, {"response_length": 64, "micro_batch_size": 8}),
]
"""Name, model (or width x layers of a random Mistral), prompt length, rank, PPO fields that differ from `PLAIN`."""


def shape_config(number: int, folder: str) -> RunConfig:
    """Return the config of one shape; a random Mistral is built in `folder`."""
    _, model, prompt, rank, changed = SHAPES[number]
    if "x" in model:
        hidden, layers = map(int, model.split("x"))
        build_tiny_model(Path(folder), hidden, layers, 32000, hidden * 7 // 2, heads=(hidden // 128, hidden // 512))
        model = folder
    values = {
        "model_name_or_path": model, "dataset_name": ["embedded"], "max_prompt_length": prompt,
        "max_length": 2 * prompt, "lora": {"r": rank, "lora_alpha": rank}, "ppo": PLAIN | changed,
    }  # fmt: skip
    return config_from_mapping(values, "shape")


def measure(number: int) -> None:
    """Print predicted and measured peak of one shape, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(number, folder)
        usable, on_cuda = usable_bytes()
        predicted = max(p.total for p in peaks(config, model_shape(config), on_cuda, usable) if "ppo" in p.name)
        prompt = config.max_prompt_length
        config.max_prompt_length, config.max_length = 512, 1024  # so that the embedded pairs can be cut to any length
        trainer = trainer_of_shape(config, prompt)
        trainer.step()
        reset_peak_memory(trainer.base.device)
        trainer.step()
        print(json.dumps({"predicted": predicted / GIB, "measured": peak_memory_gib(trainer.base.device)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the shapes, from 0")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measure(given.measure)
        return
    numbers = given.only if given.only is not None else list(range(len(SHAPES)))
    table = Table(title="peak memory of a PPO step, GiB", title_justify="left")
    for column in ("shape", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    found: dict[str, Any] = {}
    with progress("shapes", len(numbers)) as report:
        for done, number in enumerate(numbers, 1):
            command = [sys.executable, __file__, "--measure", str(number)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise UserError(f"shape {number} ended: {(run.stderr.strip().splitlines() or ['no output'])[-1]}")
            figures = json.loads(run.stdout.strip().splitlines()[-1])
            error = figures["predicted"] / figures["measured"] - 1
            name = SHAPES[number][0]
            table.add_row(name, f"{figures['predicted']:.2f}", f"{figures['measured']:.2f}", f"{error:+.1%}")
            found[name] = figures | {"error": error}
            report(done)
    console.print(table)
    print(json.dumps({"largest_error": max(abs(f["error"]) for f in found.values()), "shapes": found}))


if __name__ == "__main__":
    run_recipe(main)
