"""One full PPO step of a config on a Mistral of any size with random weights: seconds, tokens per second, peak memory.

    python benchmarks/mistral_shape.py --hidden_size 256 --layers 4                       # tries it on any machine
    python benchmarks/mistral_shape.py --hidden_size 4096 --layers 32 --cap_gib 24        # Mistral-7B's shape, on CUDA
    python benchmarks/mistral_shape.py --hidden_size 4096 --layers 32 --cap_gib 24 --arms transformers unsloth trl

Speed and memory do not depend on the values of the weights, so nothing is downloaded. Prompts are cut or filled to the
config's max_prompt_length and no answer ends early, so that the step is as large as the config allows. The arms run one
after another, each in a process of its own: the two backends of ours on the same prompts and seed (their first policy
losses should agree within bfloat16's rounding), and TRL 1.12's PPOTrainer, from a virtual environment that is made once
or from --peer_path. Running out of memory is a result too. The planner's prediction stands beside the measured peak.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ppo_step import PEER_VERSION, Contestant, cap_memory, peer_python
from rich.table import Table
from shapes import full_length, trainer_of_shape

from lora_rlhf.base.devices import device
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file, config_from_mapping, config_to_mapping
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.errors import UserError
from lora_rlhf.memory import GIB, usable_bytes, with_checkpointing_decided
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory
from lora_rlhf.memory_plan import model_shape, peaks
from lora_rlhf.terminal import console, run_recipe

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
PEERS = Path(__file__).parent / "peers"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIGS / "mistral_7b_24gb.yaml"), help="config whose PPO step is run")
    parser.add_argument("--hidden_size", type=int, default=256, help="width; Mistral-7B has 4096 [256]")
    parser.add_argument("--layers", type=int, default=4, help="depth; Mistral-7B has 32 [4]")
    parser.add_argument("--vocab_size", type=int, default=32000, help="rows of the embedding [32000]")
    parser.add_argument("--steps", type=int, default=1, help="PPO steps after which the peak is read [1]")
    parser.add_argument("--cap_gib", type=float, help="CUDA: refuse memory beyond this, as a smaller card would")
    parser.add_argument("--batch_size", type=int, help="override ppo.batch_size")
    parser.add_argument("--response_length", type=int, help="override ppo.response_length")
    parser.add_argument(
        "--arms", nargs="+", choices=["transformers", "unsloth", "trl"], default=["transformers"],
        help="backends of ours, and the peer [transformers]",
    )  # fmt: skip
    parser.add_argument("--peer_path", help="folder with TRL 1.12 to import from, in place of the virtual environment")
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def shaped_config(given: argparse.Namespace, folder: str, backend: str) -> RunConfig:
    """Return the named config on the random model and the embedded prompts."""
    values = config_to_mapping(config_from_file(given.config))
    values |= {
        "model_name_or_path": folder, "dataset_name": ["embedded"], "dataset_weights": [],
        "output_dir": f"{folder}/run", "backend": backend,
    }  # fmt: skip
    values["ppo"]["value_warmup_steps"] = 0
    for field in ("batch_size", "response_length"):
        if getattr(given, field):
            values["ppo"][field] = getattr(given, field)
    values["ppo"]["normalization_samples"] = min(values["ppo"]["normalization_samples"], values["ppo"]["batch_size"])
    values["ppo"]["stop_strings"] = []
    return with_checkpointing_decided(config_from_mapping(values, given.config), given.cap_gib)


def measured_step(config: RunConfig, steps: int) -> dict[str, Any]:
    """Load the base, make the four roles, take `steps` PPO steps; return seconds and memory, measured and predicted."""
    usable, on_cuda = usable_bytes()
    predicted = max(p.total for p in peaks(config, model_shape(config), on_cuda, usable) if p.name.startswith("ppo"))
    started = time.perf_counter()
    trainer = trainer_of_shape(config, config.max_prompt_length)
    loaded = time.perf_counter() - started
    reset_peak_memory(trainer.base.device)
    metrics: dict[str, float] = {}
    for _ in range(steps):
        metrics = trainer.step()
    seconds = {stage: metrics[f"seconds_{stage}"] for stage in ("rollout", "score", "update")}
    tokens = metrics["response_length"] * config.ppo.batch_size
    return {
        "parameters": trainer.base.causal_lm.num_parameters(),
        "load_seconds": loaded,
        **seconds,
        "seconds": sum(seconds.values()),
        "samples_per_second": metrics["samples_per_second"],
        "rollout_tokens_per_second": tokens / seconds["rollout"],
        "peak_gib": peak_memory_gib(trainer.base.device),
        "predicted_gib": predicted / GIB,
        "policy_loss": metrics["policy_loss"],
        "value_loss": metrics["value_loss"],
        "first_ratio_deviation": metrics["first_ratio_deviation"],
    }


def our_arm(backend: str, folder: str) -> dict[str, Any]:
    """Return what a process with this backend measures, or the error it ends with."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", backend, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": last_line(done.stdout + done.stderr)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def trl_arm(given: argparse.Namespace, config: RunConfig, folder: str) -> dict[str, Any]:
    """Return what TRL's trainer takes for the same step, or the error it ends with."""
    s = config.ppo
    tokenizer = load_tokenizer(config)
    pairs, _ = preference_pairs(config, tokenizer, "train")
    prompts = Path(folder) / "prompts.json"
    prompts.write_text(json.dumps(full_length(pairs, tokenizer, config.max_prompt_length)))
    shape = {
        "model": folder, "prompts": prompts, "rank": config.lora.r, "batch": s.batch_size, "micro": s.micro_batch_size,
        "scoring": s.scoring_batch_size, "response": s.response_length, "epochs": s.num_ppo_epochs,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in shape.items()]
    words += [f"--cap_gib={given.cap_gib}"] if given.cap_gib else []
    words += ["--checkpointing"] if s.gradient_checkpointing else []
    python = sys.executable if given.peer_path else str(peer_python(PEER_VERSION))
    if given.peer_path:
        os.environ["PYTHONPATH"] = os.pathsep.join([given.peer_path, os.environ.get("PYTHONPATH", "")])
    peer: Contestant | None = None
    try:
        peer = Contestant("trl", [python, str(PEERS / "trl_ppo.py"), *words])
        for _ in range(given.steps):
            result = peer.step()
    except UserError as error:
        return {"error": str(error)}
    finally:
        if peer:
            peer.close()
    tokens = s.batch_size * s.response_length
    rates = {"samples_per_second": s.batch_size / result["seconds"]}
    return result | rates | {"rollout_tokens_per_second": tokens / result["rollout"]}


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def main() -> None:
    given = arguments()
    cap_memory(given.cap_gib)
    if given.worker:
        print(json.dumps(measured_step(shaped_config(given, given.worker[1], given.worker[0]), given.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        heads = max(1, given.hidden_size // 128)
        build_tiny_model(
            Path(folder), given.hidden_size, given.layers, given.vocab_size, given.hidden_size * 7 // 2,
            heads=(heads, max(1, heads // 4)), dtype=torch.bfloat16, chat_template=None,
        )  # fmt: skip
        config = shaped_config(given, folder, "transformers")
        results = {arm: trl_arm(given, config, folder) if arm == "trl" else our_arm(arm, folder) for arm in given.arms}
    shape = f"batch {config.ppo.batch_size}, prompt {config.max_prompt_length}, answer {config.ppo.response_length}"
    table = Table(title=f"one PPO step on {device()}: {shape}", title_justify="left")
    table.add_column("what")
    for arm in results:
        table.add_column(arm, justify="right")
    for name in dict.fromkeys(name for result in results.values() for name in result):
        cells = [result.get(name, "") for result in results.values()]
        table.add_row(name, *(f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)
    print(json.dumps({"device": str(device()), "cap_gib": given.cap_gib, "hidden_size": given.hidden_size, **results}))


if __name__ == "__main__":
    run_recipe(main)
