"""What three arms that answer together cost against one that answers alone; interleaved, medians.

    python benchmarks/chat.py                                      # SmolLM2-135M in NF4
    python benchmarks/chat.py --prompt 200 --tokens 64 128 --rounds 5

Base, and two LoRA adapters on it, answer one prompt each, in one mixed batch as the demo decodes them and one by one,
from the 4-bit weights and from the 16-bit copy that is held where memory has room. No answer ends early. The last line
is JSON: seconds by shape, and `ratio`, the worst of the first length: together over base alone, which is the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median

import torch
from rich.table import Table
from shapes import Endless, full_length

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import INSTRUCT, POLICY, REFERENCE, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.chat.mixed_decoding import ChatSampling, MixedDecoding
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.terminal import console, progress, run_recipe

ARMS = {"base": [REFERENCE], "Instruct": [INSTRUCT], "Plus": [POLICY], "together": [REFERENCE, INSTRUCT, POLICY]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="base: embedded, a folder or a Hub name [embedded]")
    parser.add_argument("--dtype", default="bfloat16", help="what is computed in [bfloat16]")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the prompt [40]")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="tokens of each answer [64]")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linear layers [16]")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each [5]")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    lora = LoraSettings(r=given.rank, lora_alpha=2 * given.rank)
    config = RunConfig(model_name_or_path=given.model, dtype=given.dtype, lora=lora)
    tokenizer = load_tokenizer(config)
    base = SharedBase(load_causal_lm(config), lora_config(lora), getattr(torch, config.dtype))
    base.new_adapter(INSTRUCT, lora_config(lora), trainable=False)
    prompt = full_length(preference_pairs(config, tokenizer, "train")[0], tokenizer, given.prompt)[0]
    seconds: dict[tuple[str, int, str], list[float]] = {}
    weights: dict[str, Callable[[], AbstractContextManager[None]]]
    weights = {"4-bit": contextlib.nullcontext, "16-bit copy": base.layers.working_copy}
    with progress("rounds", len(weights) * len(given.tokens) * (given.rounds + 1)) as report:
        done = 0
        for kind, held in weights.items():
            with held():
                for tokens in given.tokens:
                    for number in range(given.rounds + 1):
                        for arm, roles in ARMS.items():
                            taken = seconds_of_answers(base, roles, prompt, Endless(tokenizer), tokens)
                            if number:  # the first warms up
                                seconds.setdefault((kind, tokens, arm), []).append(taken)
                        done += 1
                        report(done)
    middle = {key: median(values) for key, values in seconds.items()}
    table = Table(title="seconds", title_justify="left")
    for column in ("weights", "tokens", *ARMS, "together / base"):
        table.add_column(column, justify="right")
    ratios = {}
    for kind in weights:
        for tokens in given.tokens:
            row = {arm: middle[kind, tokens, arm] for arm in ARMS}
            ratios[kind, tokens] = row["together"] / row["base"]
            table.add_row(kind, str(tokens), *(f"{s:.2f}" for s in row.values()), f"{ratios[kind, tokens]:.2f}")
    console.print(table)
    worst = max(ratios[kind, given.tokens[0]] for kind in weights)
    by_name = {f"{kind} {tokens} {arm}": round(s, 4) for (kind, tokens, arm), s in middle.items()}
    print(json.dumps({"ratio": round(worst, 3), "seconds": by_name}))


def seconds_of_answers(base: SharedBase, roles: list[str], prompt: list[int], tokenizer: Endless, tokens: int) -> float:
    """Return how long it takes to answer `prompt` once by each role, all of them together."""
    started = time.perf_counter()
    decoding = MixedDecoding(base, roles, [prompt] * len(roles), tokenizer, ChatSampling(0.7, 1.0, tokens))
    while decoding.live:
        decoding.step()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_recipe(main)
