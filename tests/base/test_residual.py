"""The sum of the layers' outputs is kept in float32, so that 16-bit states are nearer to those of float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.lean_layers import rms_norm
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import LoraSettings
from lora_rlhf.ppo.rollout_cache import rollout_cache

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.randint(0, 96, (4, 40), generator=torch.Generator().manual_seed(0))


def deep_model(kind: type[Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**SIZES)).to(dtype).eval()


def shared(model: Any, dtype: torch.dtype) -> SharedBase:
    return SharedBase(model, lora_config(LoraSettings(r=4, target_modules=["q_proj"])), dtype)


def error(states: torch.Tensor, exact: torch.Tensor) -> float:
    return ((states.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_states_are_nearer_to_float32_than_those_of_the_stock_model(kind: type[Any], dtype: torch.dtype) -> None:
    stock = deep_model(kind, dtype)
    exact = copy.deepcopy(stock).float().model(IDS).last_hidden_state
    theirs = error(stock.model(IDS).last_hidden_state, exact)
    ours = shared(stock, dtype).hidden(REFERENCE, IDS, torch.ones_like(IDS, dtype=torch.bool))
    assert ours.dtype == dtype
    assert error(ours, exact) < 0.85 * theirs


@torch.no_grad()
def test_what_enters_a_product_and_the_cache_stays_in_16_bits() -> None:
    base = shared(deep_model(MistralConfig, torch.bfloat16), torch.bfloat16)
    cache, entered = rollout_cache(base.trunk.config, 40), []
    for name, module in base.trunk.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].dtype))
    with base.role(POLICY), base.autocast():
        base.trunk(IDS, past_key_values=cache, use_cache=True)
    assert set(entered) == {torch.bfloat16}
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16


def test_a_norm_of_float32_gives_16_bits_and_takes_its_gradient_in_float32() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 64).bfloat16()
    upstream = torch.linspace(-1, 1, 64)
    exact = weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad((exact * upstream).sum(), x)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    (y.float() * upstream).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert error(x.grad, expected) < torch.finfo(torch.bfloat16).eps
