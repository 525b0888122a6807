"""No run begins whose texts are longer than its models have positions for; the longest one has room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.positions import STOP_STRING_TOKENS, check_positions
from lora_rlhf.base.shared import POLICY, REWARD, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import LoraSettings, PpoSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import named_arms
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers
from lora_rlhf.session import Session


def short(tiny_folder: Path, folder: Path, positions: int) -> str:
    """A copy of the tiny model that says it has fewer positions."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return str(folder)


def of(prompt: int, answer: int, pair: int, *stops: str) -> RunConfig:
    ppo = PpoSettings(response_length=answer, stop_strings=list(stops))
    return RunConfig(max_prompt_length=prompt, max_length=pair, ppo=ppo)


@pytest.mark.parametrize(
    ("config", "positions"),
    [(of(32, 31, 64), 64), (of(32, 16, 64), 64), (of(32, 23, 64, "#"), 64), (of(512, 512, 512), None)],
)
def test_texts_that_fit_pass(config: RunConfig, positions: int | None) -> None:
    check_positions(config, SimpleNamespace(model_type="opt", max_position_embeddings=positions))
    check_positions(config, SimpleNamespace(model_type="mamba"))


@pytest.mark.parametrize(
    ("config", "setting", "words"),
    [
        (
            of(32, 32, 64),
            "model_name_or_path",
            "^max_prompt_length: prompts of 32 tokens and answers of 32 .* up to 65",
        ),
        (of(32, 24, 64, "#"), "--models: base", "take up to 65 tokens with their end, and opt .* has 64 positions"),
        (of(16, 16, 65), "model_name_or_path", "^max_length: pairs take up to 65 tokens, .* set max_length: 64, or"),
    ],
)
def test_texts_that_do_not_are_refused_with_the_setting_to_change(config: RunConfig, setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_positions(config, SimpleNamespace(model_type="opt", max_position_embeddings=64), setting)


def test_pairs_are_not_trained_on_another_model() -> None:
    instruct = SimpleNamespace(model_type="opt", max_position_embeddings=64)
    check_positions(of(32, 16, 512), instruct, "instruct_model_name_or_path")


def test_a_run_refuses_its_base_its_instruct_model_and_an_arm(
    make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path
) -> None:
    model = short(tiny_folder, tmp_path / "short", 100)
    with pytest.raises(UserError, match=r"^max_prompt_length: .* mistral \(model_name_or_path\) has 100 positions"):
        Session.open(make_config(model_name_or_path=model))
    with pytest.raises(UserError, match=r"\(instruct_model_name_or_path\) has 100 positions"):
        Session.open(make_config(instruct_model_name_or_path=model))
    with pytest.raises(UserError, match=r"\(--models: plus\) has 100 positions"):
        named_arms(make_config(), {"base": str(tiny_folder), "plus": model})
    Session.open(make_config(model_name_or_path=model, max_prompt_length=64, max_length=100))


@pytest.mark.parametrize(("name", "stop"), [("gpt_neo", ""), ("opt", "#")])
def test_a_model_with_a_table_of_positions_answers_and_scores_the_longest_text(
    tokenizer: Any, name: str, stop: str
) -> None:
    """One position fewer, and the table has no row for EOS."""
    prompt, answer = 12, 6
    positions = prompt + answer + 1 + (STOP_STRING_TOKENS if stop else 0)
    config = AutoConfig.for_model(name)
    settings = lora_config(LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))
    model = small_twin(config, AutoModelForCausalLM, vocab_size=len(tokenizer), max_position_embeddings=positions)
    check_positions(of(prompt, answer, prompt, *[stop] * bool(stop)), model.config)
    base = SharedBase(model, settings, torch.float32)
    base.new_adapter(REWARD, settings, trainable=False)
    sampling, generator = Sampling(answer, 1.0, (stop,) if stop else ()), torch.Generator().manual_seed(0)
    rollout = sampled_answers(base, POLICY, [[7] * prompt] * 3, sampling, tokenizer, generator)
    ids, mask = rollout.text_ids, rollout.text_mask
    assert int(mask.sum(1).max()) >= prompt + answer
    assert base.scores(REWARD, ids, mask, 3).isfinite().all()
