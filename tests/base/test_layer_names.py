"""What a base says of itself: layers without adapters, weights that are not in 4 bits; and tokens without embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_rlhf.base.layer_names import base_description, linear_names
from lora_rlhf.base.randomness import turn_off_randomness
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.base.tokenizer import check_vocabulary
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.model_check import loaded_base

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


def saved(tmp_path: Path, name: str, **fields: Any) -> str:
    twin = small_twin(transformers.AutoConfig.for_model(name), transformers.AutoModelForCausalLM, **fields)
    twin.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_base_whose_layers_are_all_adapted_says_one_line(make_base: Callable[..., SharedBase]) -> None:
    base = make_base()
    lines = base_description(base.causal_lm, base.device)
    assert len(lines) == 1 and lines[0].startswith("MistralForCausalLM, NF4, double quantisation: ")


def test_linear_layers_without_an_adapter_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    base = loaded_base(make_config(model_name_or_path=saved(tmp_path, "phi3")))
    assert linear_names(base.causal_lm) == ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]
    assert base_description(base.causal_lm, CPU)[1:] == [
        "2 of 4 kinds of linear layers in a block get an adapter (o_proj, down_proj); without one: qkv_proj, "
        "gate_up_proj. lora.target_modules chooses them"
    ]


def test_stacked_experts_that_are_not_in_4_bits_are_told(make_config: MakeConfig, tmp_path: Path) -> None:
    """Per layer of Mixtral's twin: attention 64·64·2 + 64·32·2, experts 4·3·64·96, router 4·64."""
    base = loaded_base(make_config(model_name_or_path=saved(tmp_path, "mixtral")))
    packed, experts, router = 64 * 64 * 2 + 64 * 32 * 2, 4 * 3 * 64 * 96, 4 * 64
    (line,) = base_description(base.causal_lm, CPU)[1:]
    size = 2 * 4 * (experts + router) / 2**30
    assert line.startswith(
        f"only {packed / (packed + experts + router):.0%} of the weights inside the layers are in 4 "
    )
    assert "stacked experts (gate_up_proj and the like)" in line and line.endswith(f"{size:.1f} GiB")


def test_a_target_that_is_nowhere_is_answered_with_those_that_are(make_config: MakeConfig) -> None:
    config = make_config(lora=LoraSettings(target_modules=["nothing_proj"]))
    with pytest.raises(UserError, match=r"none of nothing_proj. .* set lora.target_modules: \[q_proj, k_proj, v_proj"):
        loaded_base(config)


def test_every_rate_is_off_and_the_config_that_is_saved_keeps_its_own() -> None:
    config = transformers.AutoConfig.for_model("gptj", attn_pdrop=0.1, resid_pdrop=0.2)
    model = small_twin(config, transformers.AutoModelForCausalLM)
    turn_off_randomness(model)
    assert model.config.attn_pdrop == 0.1
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_router_that_samples_in_train_mode_stays_in_eval_mode() -> None:
    model = small_twin(transformers.AutoConfig.for_model("phimoe"), transformers.AutoModelForCausalLM)
    turn_off_randomness(model)
    routers = [module for module in model.train().modules() if hasattr(module, "router_jitter_noise")]
    assert routers and not any(router.training for router in routers) and model.training


def test_a_tokenizer_with_words_beyond_the_embeddings_is_refused(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, len(tokenizer), "it")
    with pytest.raises(UserError, match=r"it: its tokenizer has 12 tokens that the model has no embedding for .*500"):
        check_vocabulary(tokenizer, 500, "it")


@pytest.mark.parametrize("used", [False, True])
def test_a_special_token_beyond_the_embeddings_matters_where_it_is_used(tokenizer: Any, used: bool) -> None:
    """Gemma 3 without images has a token for images all the same."""
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if not used:
        check_vocabulary(tokenizer, size, "it")
        return
    tokenizer.pad_token = "<image>"
    with pytest.raises(UserError, match="no embedding for .the first is '<image>', number 512"):
        check_vocabulary(tokenizer, size, "it")
