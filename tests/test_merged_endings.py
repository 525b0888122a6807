"""The merged model ends its answers in stock transformers where they ended in training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from lora_rlhf.base.shared import REFERENCE, SharedBase
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.merge import MergedWeights, write_merged
from lora_rlhf.ppo.decoding import Sampling

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def base(make_base: Callable[..., SharedBase]) -> SharedBase:
    """Without adapter: what it says first, it says again in every model made of it."""
    return make_base(roles=())


def always_says(base: SharedBase, tokenizer: Any, token: str) -> None:
    """Let the answer to `MESSAGES` begin with `token`, whatever is drawn."""
    prompt = torch.tensor([prompt_ids(tokenizer, MESSAGES)])
    with torch.no_grad():
        state = base.hidden("policy", prompt, torch.ones_like(prompt, dtype=torch.bool))[0, -1]
        base.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 100 * state / state.norm()


@pytest.mark.parametrize(
    "eos", ["<|im_end|>", "<s>"], ids=["EOS closes a turn", "another token than EOS closes a turn"]
)
def test_stock_generate_and_pipeline_stop_where_the_turn_ends(
    base: SharedBase, tokenizer: Any, tmp_path: Path, eos: str
) -> None:
    tokenizer.eos_token = eos
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    always_says(base, tokenizer, "<|im_end|>")
    write_merged(MergedWeights(base), tokenizer, Sampling(8, 1.0), tmp_path / "merged")
    held = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert held.eos_token_id == (end if eos == "<|im_end|>" else [tokenizer.eos_token_id, end])
    assert held.pad_token_id == tokenizer.pad_token_id and held.stop_strings is None
    assert not (tmp_path / "merged" / "README.md").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt = torch.tensor([prompt_ids(tokenizer, MESSAGES)])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]
    assert answer.tolist() == [end]
    chat = pipeline("text-generation", model=str(tmp_path / "merged"))
    assert chat(MESSAGES)[0]["generated_text"][-1]["content"] == ""


def test_the_readme_of_a_model_with_stop_strings_says_how_to_stop_there(
    base: SharedBase, tokenizer: Any, tmp_path: Path
) -> None:
    """Its code is run as it stands: without it the model runs on, with it the model stops."""
    folder = str(tmp_path / "merged")
    with base.role(REFERENCE):
        always_says(base, tokenizer, tokenizer.convert_ids_to_tokens(300))
    stop = tokenizer.decode([300])
    write_merged(MergedWeights(base), tokenizer, Sampling(8, 1.0, (stop, 'no "such"\n\ntext:')), tmp_path / "merged")
    readme = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)\n```", readme, re.DOTALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([prompt_ids(tokenizer, MESSAGES)])
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert model.generate(**prompt).shape[1] == tokens.shape[1] + 8
    space = {
        "prompt": prompt, "model": model, "messages": MESSAGES, "folder": folder, "pipeline": pipeline,
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }  # fmt: skip
    setup, *calls = code.splitlines()
    exec(setup, space)
    assert space["stop_strings"] == [stop, 'no "such"\n\ntext:']
    generated, chatted = (eval(call, space) for call in calls)
    assert generated[0, tokens.shape[1] :].tolist() == [300]
    assert chatted[0]["generated_text"][-1]["content"] == stop


def test_it_goes_on_to_end_where_the_model_ended_before(base: SharedBase, tokenizer: Any, tmp_path: Path) -> None:
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<s>")
    ordinary = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    base.causal_lm.generation_config.eos_token_id = [other, end, ordinary]
    write_merged(MergedWeights(base), tokenizer, Sampling(8, 1.0), tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [end, other]
