"""Another backend is trusted only where its trunk does not look ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.base.backend_check import reads_causally
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.config import RunConfig


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_models_pass(make_config: Callable[..., RunConfig], dtype: str) -> None:
    assert reads_causally(load_causal_lm(make_config(dtype=dtype)))


def test_a_model_that_looks_ahead_fails(make_config: Callable[..., RunConfig]) -> None:
    model = load_causal_lm(make_config())
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not reads_causally(model)


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError])
def test_a_model_that_cannot_be_called_without_a_mask_fails(
    make_config: Callable[..., RunConfig], error: type[Exception]
) -> None:
    model = load_causal_lm(make_config())

    def forward(**_: Any) -> Any:
        raise error

    model.model.forward = forward
    assert not reads_causally(model)
    assert torch.is_grad_enabled()
