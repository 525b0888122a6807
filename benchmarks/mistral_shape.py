"""One full PPO step of a config on a Mistral of any size with random weights: seconds and peak memory.

    python benchmarks/mistral_shape.py --hidden_size 256 --layers 4                       # tries it on any machine
    python benchmarks/mistral_shape.py --hidden_size 4096 --layers 32 --cap_gib 24        # Mistral-7B's shape, on CUDA

Speed and memory do not depend on the values of the weights, so nothing is downloaded. Prompts are cut or filled to the
config's max_prompt_length and no answer ends early, so that the step is as large as the config allows. The last line
is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import device, load_causal_lm, load_tokenizer
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file, config_from_mapping, config_to_mapping
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import AdapterReward, CombinedReward
from lora_rlhf.terminal import console, run_recipe

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"


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
    parser.add_argument("--backend", choices=["transformers", "unsloth"], help="override backend")
    return parser.parse_args()


def shaped_config(given: argparse.Namespace, folder: Path) -> RunConfig:
    """Return the named config on the random model and the embedded prompts."""
    values = config_to_mapping(config_from_file(given.config))
    values |= {
        "model_name_or_path": str(folder), "dataset_name": ["embedded"], "dataset_weights": [],
        "output_dir": str(folder / "run"), "backend": given.backend or "transformers",
    }  # fmt: skip
    values["ppo"]["value_warmup_steps"] = 0
    for field in ("batch_size", "response_length"):
        if getattr(given, field):
            values["ppo"][field] = getattr(given, field)
    values["ppo"]["normalization_samples"] = min(values["ppo"]["normalization_samples"], values["ppo"]["batch_size"])
    values["ppo"]["stop_strings"] = []
    return config_from_mapping(values, given.config)


def full_length(pairs: list[PreferencePair], tokenizer: Any, width: int) -> list[list[int]]:
    """Return prompts of exactly `width` tokens, made of the embedded prompts."""
    stream = [i for pair in pairs for i in tokenizer(pair.prompt[-1][1], add_special_tokens=False)["input_ids"]]
    stream = stream * (1 + width * len(pairs) // len(stream))
    return [stream[k * width : (k + 1) * width] for k in range(len(pairs))]


def measured_step(config: RunConfig, steps: int) -> dict[str, Any]:
    """Load the base, make the four roles, take `steps` PPO steps; return seconds and peak memory."""
    tokenizer = load_tokenizer(config)
    pairs, _ = preference_pairs(config, tokenizer, "train")
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), getattr(torch, config.dtype))
    loaded = time.perf_counter() - started
    weights = peak_memory_gib(base.device)
    base.new_adapter(REWARD, lora_config(config.lora), trainable=False)
    with torch.no_grad():
        base.heads[REWARD].weight.normal_(std=0.02)  # type: ignore[operator]
    reset_peak_memory(base.device)
    source = AdapterReward(base, batch=config.ppo.scoring_batch_size)
    trainer = PpoTrainer(base, tokenizer, pairs, CombinedReward([source]), config.ppo, config.seed)
    trainer.prompt_ids = full_length(pairs, tokenizer, config.max_prompt_length)
    metrics: dict[str, float] = {}
    for _ in range(steps):
        metrics = trainer.step()
    tokens = metrics["response_length"] * config.ppo.batch_size
    return {
        "parameters": base.causal_lm.num_parameters(),
        "load_seconds": loaded,
        "weights_gib": weights,
        **{k: metrics[f"seconds_{k}"] for k in ("rollout", "score", "update")},
        "samples_per_second": metrics["samples_per_second"],
        "rollout_tokens_per_second": tokens / metrics["seconds_rollout"],
        "peak_gib": peak_memory_gib(base.device),
        "first_ratio_deviation": metrics["first_ratio_deviation"],
    }


def main() -> None:
    given = arguments()
    if given.cap_gib and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap_gib / whole))
    with tempfile.TemporaryDirectory() as folder:
        heads = max(1, given.hidden_size // 128)
        build_tiny_model(
            Path(folder), given.hidden_size, given.layers, given.vocab_size, given.hidden_size * 7 // 2,
            heads=(heads, max(1, heads // 4)), dtype=torch.bfloat16, chat_template=None,
        )  # fmt: skip
        config = shaped_config(given, Path(folder))
        result = measured_step(config, given.steps)
    table = Table(title=f"one PPO step on {device()}, batch {config.ppo.batch_size}", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    print(json.dumps({"device": str(device()), "cap_gib": given.cap_gib, "hidden_size": given.hidden_size, **result}))


if __name__ == "__main__":
    run_recipe(main)
