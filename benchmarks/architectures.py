"""Which architectures of transformers can be the shared base, and how near the base is to stock transformers and PEFT.

    python benchmarks/architectures.py                          # print the table; a minute
    python benchmarks/architectures.py --write docs/models.md   # and put it into the page
    python benchmarks/architectures.py opt falcon_h1            # some of them

Each row is a small twin (random weights, a few narrow layers, float32, on the CPU) and the very check that every recipe
makes of its own model before it begins (`lora_rlhf.ppo.architecture_check`), with the largest difference of each
reading.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.base.layer_names import linear_names
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.base.text_part import text_config
from lora_rlhf.config import LoraSettings
from lora_rlhf.errors import UserError
from lora_rlhf.ppo import readings
from lora_rlhf.ppo.architecture_check import NoTwin, architecture_differences
from lora_rlhf.ppo.model_check import LIMIT, words
from lora_rlhf.ppo.readings import GRADIENTS, SCORES

NOT_DEFAULT: dict[str, dict[str, Any]] = {
    "falcon_h1": {"lm_head_multiplier": 0.0625},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.22},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"] * 16},
    "mixtral": {"router_jitter_noise": 0.1},
    "phi3": {"resid_pdrop": 0.1},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1},
}
"""Fields that published models of an architecture have otherwise than transformers' defaults, and that matter here."""
TARGETS = {"mamba2": ["in_proj"]}
"""lora.target_modules of architectures for which those that a refusal advises are refused by PEFT."""
ARCHITECTURES = (
    "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "falcon",
    "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "helium", "hunyuan_v1_dense", "jamba", "lfm2", "llama", "llama4",
    "mamba2", "minimax_m2", "ministral", "mistral", "mistral3", "mixtral", "mpt", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen3", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
READINGS = (
    readings.EVAL, readings.TRAIN, GRADIENTS, readings.DECODED, readings.MIXED, readings.MIXED_DECODED, SCORES,
)  # fmt: skip
TITLES = ("log-probs", "in train mode", "gradients", "decoding", "mixed pass", "mixed decoding", "reward scores")
BEGIN, END = "<!-- table: benchmarks/architectures.py -->", "<!-- end of table -->"


@dataclass
class Row:
    """What the check says of one architecture.

    Attributes:
        name: transformers' model type.
        verdict: runs, runs with other settings (which), or refused (in which words).
        apart: reading → largest difference.
        default: the kinds of linear layers that the default lora.target_modules adapt, of how many.
    """

    name: str
    verdict: str
    apart: dict[str, float] = field(default_factory=dict)
    default: str = ""


def checked(name: str) -> Row:
    """Return the row of one architecture: as it is, or else with the settings that the refusal advises."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = AutoConfig.for_model(name, **NOT_DEFAULT.get(name, {}))
    try:
        found = text_config(found, name, "model_name_or_path")
        names = linear_names(small_twin(found, AutoModelForCausalLM))
    except UserError as error:
        return Row(name, _refused(error))
    default = f"{len(set(names) & set(LoraSettings().target_modules))} of {len(names)}"
    standard = LoraSettings(r=4, target_modules=TARGETS.get(name, LoraSettings().target_modules))
    advice: list[str] = []
    own_reward, lora = True, standard
    while True:
        apart: dict[str, float] = {}
        try:
            for one in architecture_differences(found, lora, own_reward=own_reward):
                apart[one.reading] = one.largest
                if not one.largest <= LIMIT:
                    raise UserError(words(found, one.reading, one.largest, LIMIT))
        except NoTwin as error:
            return Row(name, f"not known: {error}", default=default)
        except UserError as error:
            advised = re.search(r"set lora\.target_modules: \[(.+)\]", str(error), re.IGNORECASE)
            if advised and lora is standard:
                lora = LoraSettings(r=4, target_modules=advised[1].split(", "))
                advice.append(f"lora.target_modules: [{advised[1]}]")
            elif str(error).startswith("ppo.reward_sources") and own_reward:
                own_reward = False
                advice.append("a reward of another model (ppo.reward_sources)")
            else:
                return Row(name, _refused(error), default=default)
            continue
        return Row(name, "runs" + (" with " if advice else "") + " and ".join(advice), apart, default)


def _refused(error: UserError) -> str:
    return f"refused: {error}"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| architecture | adapted | verdict | " + " | ".join(TITLES) + " |", "| --- " * (3 + len(TITLES)) + "|"]
    for row in rows:
        figures = [f"{row.apart[reading]:.0e}" if reading in row.apart else "" for reading in READINGS]
        lines.append(f"| {row.name} | {row.default} | {row.verdict.replace('|', '/')} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def verdicts(page: str) -> dict[str, str]:
    """Return architecture → verdict of the table in a page."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in inside.strip().splitlines()[2:]]
    return {line[0]: line[2] for line in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, metavar="NAME", help="model types [all]")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    rows = [checked(name) for name in given.names]
    print(table(rows))
    running = [row for row in rows if row.verdict.startswith("runs")]
    largest = max((value for row in running for value in row.apart.values()), default=0.0)
    print(json.dumps({"architectures": len(rows), "run": len(running), "largest_difference": largest}))
    if given.write:
        page = given.write.read_text(encoding="utf-8")
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        given.write.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
