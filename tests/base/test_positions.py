"""No run begins whose texts are longer than its models have positions for; the longest one has room."""

from __future__ import annotations

import contextlib
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
from lora_rlhf.base.positions import PIECES, check_positions, most_positions
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import LoraSettings, PpoSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import named_arms
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import model_answers
from lora_rlhf.session import Session

ADAPTER = lora_config(LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))


class Says:
    """A decoder that has these answers ready."""

    device, reads_working_copy = torch.device("cpu"), False

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = torch.tensor(answers)

    def __call__(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answers, torch.zeros(self.answers.shape)


def short(tiny_folder: Path, folder: Path, positions: int) -> str:
    """A copy of the tiny model that says it has fewer positions."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return str(folder)


def of(prompt: int, answer: int, pair: int) -> RunConfig:
    return RunConfig(max_prompt_length=prompt, max_length=pair, ppo=PpoSettings(response_length=answer))


@pytest.mark.parametrize(
    ("config", "positions"), [(of(32, 23, 64), 64), (of(32, 16, 64), 64), (of(512, 512, 512), None)]
)
def test_texts_that_fit_pass(config: RunConfig, positions: int | None) -> None:
    check_positions(config, SimpleNamespace(model_type="opt", max_position_embeddings=positions))
    check_positions(config, SimpleNamespace(model_type="mamba"))


@pytest.mark.parametrize(
    ("config", "setting", "words"),
    [
        (
            of(32, 24, 64),
            "model_name_or_path",
            "^max_prompt_length: prompts of 32 tokens, answers of 24 .* make 65",
        ),
        (of(32, 24, 64), "--models: base", r"8 to spare and EOS make 65, and opt \(--models: base\) has 64 positions"),
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


def test_a_model_with_a_table_of_positions_scores_the_longest_text(tokenizer: Any) -> None:
    """One position fewer, and the table has no row for EOS. A stop string cuts a token, read as more than 8."""
    prompt, cut = 12, "zqxjvwkzqxjvwkzqxjvwk#"
    tokenizer.add_tokens([cut])
    said = tokenizer(cut, add_special_tokens=False)["input_ids"]
    longest = prompt + len(said) + PIECES + 1
    sampling = Sampling(len(said), 1.0, ("#",))
    rollout = model_answers(Says([said]), [[7] * prompt], sampling, tokenizer, torch.Generator())
    assert int(rollout.text_mask.sum()) == longest
    for positions, fits in ((longest, True), (longest - 1, False)):
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
        model = small_twin(AutoConfig.for_model("gpt_neo"), AutoModelForCausalLM, **sizes)
        base = SharedBase(model, ADAPTER, torch.float32)
        base.new_adapter(REWARD, ADAPTER, trainable=False)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"has {positions} positions"):
            check_positions(of(prompt, len(said), prompt), model.config)
        with contextlib.nullcontext() if fits else pytest.raises(IndexError):
            assert base.scores(REWARD, rollout.text_ids, rollout.text_mask, 1).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"max_seq_len": 32}, 32),  # MPT
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}, 4096),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_positions_are_counted_as_the_architecture_does(fields: dict[str, Any], positions: int | None) -> None:
    assert most_positions(SimpleNamespace(**fields)) == positions
