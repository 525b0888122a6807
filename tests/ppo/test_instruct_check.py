"""An Instruct model that answers otherwise in a batch than alone is refused: by its config, and when it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache

from lora_rlhf import session as session_module
from lora_rlhf import stages
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import CompareSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.instruct_check import check_instruct_architecture, check_instruct_model
from lora_rlhf.reward.sources import CombinedReward, FunctionReward
from lora_rlhf.session import Session
from lora_rlhf.stages import base_stage, compare_stage

OTHERWISE = r"instruct_model_name_or_path: .*mamba2.* not say in a batch what it says alone: left-padded decoding with"


@pytest.fixture
def of_architecture(make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """A config whose Instruct model is of another architecture: a folder with a config, a tokenizer and no weights."""

    def make(name: str, **fields: Any) -> RunConfig:
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
        shutil.copy(tiny_folder / "tokenizer_config.json", folder)
        AutoConfig.for_model(name, **fields).save_pretrained(folder)
        return make_config(instruct_model_name_or_path=str(folder))

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "llama4_text", "qwen3_moe", "gemma2"])
def test_a_model_need_not_be_one_that_could_be_shared(of_architecture: Callable[..., Any], name: str) -> None:
    assert check_instruct_architecture(of_architecture(name))


def test_a_deep_mixture_of_layers_is_read_whole(of_architecture: Callable[..., Any]) -> None:
    """Attention comes late in it, and rounding adds up."""
    kinds = [*["mamba", "mlp"] * 7, "attention", "mlp"] * 3
    assert check_instruct_architecture(of_architecture("nemotron_h", layers_block_type=kinds))


def test_nothing_is_checked_where_nothing_is_named_or_known(
    make_config: Callable[..., RunConfig], of_architecture: Callable[..., Any]
) -> None:
    assert not check_instruct_architecture(make_config())
    assert not check_instruct_architecture(of_architecture("blt"))


def test_blocks_that_come_again_are_all_in_the_twin(of_architecture: Callable[..., Any]) -> None:
    """RecurrentGemma forgets what was padding too, which shows in a twin that it can be made of."""
    config = of_architecture("recurrent_gemma", block_types=["recurrent", "recurrent", "attention"])
    with pytest.raises(UserError, match=r"recurrent_gemma.* left-padded decoding with a cache off by"):
        check_instruct_architecture(config)


def test_a_run_refuses_it_before_its_first_stage(
    of_architecture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache forgets which tokens were padding: its answers would be those to another prompt."""
    loaded: list[Any] = []
    monkeypatch.setattr(session_module, "loaded_base", lambda *_, **__: loaded.append("the base"))
    with pytest.raises(UserError, match=OTHERWISE):
        base_stage(Session.open(of_architecture("mamba2")))
    assert not loaded


def test_an_error_in_the_midst_of_it_is_put_into_words(
    of_architecture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reorder_cache(*_: Any) -> None:
        raise AttributeError("no such name")

    monkeypatch.setattr(Cache, "reorder_cache", reorder_cache)
    with pytest.raises(UserError, match=r"^instruct_model_.* cannot answer as the other arms do \(AttributeError: no"):
        check_instruct_architecture(of_architecture("llama"))


@pytest.mark.parametrize(
    ("dtype", "in_4_bits"), [("float32", False), ("bfloat16", True), ("float16", False), ("bfloat16", False)]
)
def test_a_right_model_passes_when_it_is_loaded(
    make_config: Callable[..., RunConfig], dtype: str, in_4_bits: bool
) -> None:
    model = load_causal_lm(make_config(dtype=dtype, load_in_4bit=in_4_bits))
    before = torch.random.get_rng_state()
    check_instruct_model(model, getattr(torch, dtype))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_wrong_model_is_refused_when_it_is_loaded() -> None:
    twin = small_twin(AutoConfig.for_model("mamba2"), AutoModelForCausalLM)
    with pytest.raises(UserError, match=OTHERWISE):
        check_instruct_model(twin, torch.float32)
    twin = small_twin(AutoConfig.for_model("llama"), AutoModelForCausalLM)
    twin.lm_head.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="logits that are not finite"):
        check_instruct_model(twin, torch.float32)


def test_the_compare_stage_lets_another_model_answer_and_checks_it(
    make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruct = shutil.copytree(tiny_folder, tmp_path / "instruct")
    config = make_config(
        instruct_model_name_or_path=str(instruct), compare=CompareSettings(num_prompts=4, num_safety_prompts=2)
    )
    session = Session.open(config)
    base_stage(session)
    session.shared_base().save_adapter(POLICY, session.run / "policy_adapter")
    (session.run / "score_scales.json").write_text("{}")
    length = FunctionReward(lambda completions, **_: [float(len(text)) for text in completions], "length", 1.0)
    monkeypatch.setattr(stages, "run_reward", lambda *_: CombinedReward([length]))
    checked: list[Any] = []
    monkeypatch.setattr(stages, "check_instruct_model", lambda model, dtype: checked.append((type(model), dtype)))
    compare_stage(session)
    assert [kind.__name__ for kind, _ in checked] == ["MistralForCausalLM"] and checked[0][1] == torch.float32
    arms = session.run.summary["arms"]
    assert list(arms) == ["base", "instruct", "plus"]
    assert arms["instruct"]["reward_mean"] == arms["base"]["reward_mean"]  # the same weights, the same draws
