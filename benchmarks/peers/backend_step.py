"""One PPO step of the Mistral-7B config by a backend of ours, in a process of its own; run by card.py.

Unsloth patches transformers as soon as it is imported, so that nothing else may be measured beside it. The last line
is JSON: the figures of the second step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from card_parts.bench import SIZES, Bench
from card_parts.models import step_config, step_trainer
from card_parts.peers import write_numbers
from card_parts.ppo import MAIN, PhaseMeter, step_figures

from lora_rlhf.base.devices import device
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.terminal import run_recipe


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True, choices=["transformers", "unsloth"], help="what runs the model")
    parser.add_argument("--model", required=True, help="folder of the model, in 4 bits")
    parser.add_argument("--size", required=True, choices=list(SIZES), help="of the model and of the step")
    parser.add_argument("--numbers", required=True, type=Path, help="file for the numbers to agree on")
    parser.add_argument("--cap_gib", type=float, help="CUDA: refuse memory that a card of this size would not have")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SIZES[given.size], device(), given.cap_gib, time.monotonic() + 600, Path(folder))
        config = step_config(bench, MAIN, given.cap_gib)
        config = replace(config, backend=given.backend, model_name_or_path=given.model)
        _ = bench.rates  # measured while no model stands: the buffers for it take 4 GiB
        with bench.held_to(given.cap_gib):
            trainer = step_trainer(bench, config, load_causal_lm(config))
            write_numbers(bench, trainer.base, given.numbers)
            meter = PhaseMeter(bench, trainer)
            meter.step()
            figures = step_figures(bench, config, meter, given.cap_gib)
    print(json.dumps(figures))


if __name__ == "__main__":
    run_recipe(main)
