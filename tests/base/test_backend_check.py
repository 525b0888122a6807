"""Another backend is trusted only where its trunk reads as it decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.base.backend_check import reads_as_it_decodes
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.config import RunConfig


@pytest.fixture
def model(make_config: Callable[..., RunConfig]) -> Any:
    return load_causal_lm(make_config())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_models_pass(make_config: Callable[..., RunConfig], dtype: str) -> None:
    assert reads_as_it_decodes(load_causal_lm(make_config(dtype=dtype)))


def test_a_model_that_looks_ahead_fails(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not reads_as_it_decodes(model)


def test_a_model_that_forgets_its_cache_fails(model: Any) -> None:
    whole = model.model.forward
    model.model.forward = lambda past_key_values=None, **rest: whole(**rest)
    assert not reads_as_it_decodes(model)


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_model_that_takes_no_cache_of_transformers_fails(model: Any, error: type[Exception]) -> None:
    whole = model.model.forward

    def forward(past_key_values: Any = None, **rest: Any) -> Any:
        if past_key_values is not None:
            raise error
        return whole(**rest)

    model.model.forward = forward
    assert not reads_as_it_decodes(model)
    assert torch.is_grad_enabled()
