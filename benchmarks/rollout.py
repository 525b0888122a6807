"""Tokens per second of sampling, by engine, batch and answer length; interleaved, medians.

    python benchmarks/rollout.py                                   # SmolLM2-135M in NF4
    python benchmarks/rollout.py --batch 16 64 --response 48 --rounds 5

Engines: `expanded` decodes from the temporary 16-bit copy with the adapter folded in (what rollouts do where memory has
room), `4-bit` from the 4-bit weights with the adapter beside them, and `generate` is transformers' own, on a PEFT model
that was loaded in NF4 and left as it is. All sample the full distribution, from the same prompts, and no answer ends
early. Folding and dequantising count. The last line is JSON: tokens per second by engine and shape, and `speedup`, that
of `expanded` over `generate` at the first shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from rich.table import Table
from shapes import Endless, full_length

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.packing import left_padded
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers
from lora_rlhf.terminal import console, progress, run_recipe

Engine = Callable[[list[list[int]], int], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="base: embedded, a folder or a Hub name [embedded]")
    parser.add_argument("--dtype", default="bfloat16", help="what is computed in [bfloat16]")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="answers decoded together [16 64]")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of each prompt [40]")
    parser.add_argument("--response", type=int, nargs="+", default=[48, 96], help="tokens of each answer [48 96]")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linear layers [16]")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each [3]")
    return parser.parse_args()


def engines(config: RunConfig, tokenizer: Any) -> dict[str, Engine]:
    """Return the engines, each a function that samples answers of a given length."""
    lora = lora_config(config.lora)
    base = SharedBase(load_causal_lm(config), lora, getattr(torch, config.dtype))
    stock = get_peft_model(load_causal_lm(config), lora, adapter_name=POLICY).eval()
    generator = torch.Generator().manual_seed(0)

    def ours(expand: bool) -> Engine:
        def sample(prompts: list[list[int]], length: int) -> None:
            sampling = Sampling(length, 1.0, expand_weights=expand)
            sampled_answers(base, POLICY, prompts, sampling, Endless(tokenizer), generator)

        return sample

    def generate(prompts: list[list[int]], length: int) -> None:
        ids, mask = left_padded(prompts, tokenizer.pad_token_id, base.device)
        with torch.no_grad():
            stock.generate(
                input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip

    return {"expanded": ours(True), "4-bit": ours(False), "generate": generate}


def main() -> None:
    given = arguments()
    lora = LoraSettings(r=given.rank, lora_alpha=2 * given.rank)
    config = RunConfig(model_name_or_path=given.model, dtype=given.dtype, lora=lora)
    tokenizer = load_tokenizer(config)
    pairs, _ = preference_pairs(config, tokenizer, "train")
    prompts = full_length(pairs, tokenizer, given.prompt)
    found = engines(config, tokenizer)
    shapes = [(batch, response) for batch in given.batch for response in given.response]
    rates: dict[tuple[str, int, int], list[float]] = {}
    with progress("rounds", len(shapes) * (given.rounds + 1)) as report:
        done = 0
        for batch, response in shapes:
            for number in range(given.rounds + 1):
                for name, sample in found.items():
                    started = time.perf_counter()
                    sample(prompts[:batch], response)
                    if number:  # the first warms up
                        rate = batch * response / (time.perf_counter() - started)
                        rates.setdefault((name, batch, response), []).append(rate)
                done += 1
                report(done)
    table = Table(title="tokens per second", title_justify="left")
    for column in ("batch", "answer", *found, "expanded / generate"):
        table.add_column(column, justify="right")
    middle = {key: median(values) for key, values in rates.items()}
    for batch, response in shapes:
        row = [middle[name, batch, response] for name in found]
        table.add_row(str(batch), str(response), *(f"{rate:.0f}" for rate in row), f"{row[0] / row[-1]:.1f}")
    console.print(table)
    batch, response = shapes[0]
    speedup = middle["expanded", batch, response] / middle["generate", batch, response]
    by_name = {f"{name} {b}x{r}": round(rate, 1) for (name, b, r), rate in middle.items()}
    print(json.dumps({"speedup": round(speedup, 3), "tokens_per_second": by_name}))


if __name__ == "__main__":
    run_recipe(main)
