"""Attention with gradients on a CPU is the plain one, inside the block only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_rlhf.base.attention import attention_for_gradients
from lora_rlhf.base.shared import SharedBase


def test_it_is_plain_inside_and_as_it_was_after_even_when_the_block_fails(make_base: Callable[..., SharedBase]) -> None:
    causal_lm = make_base().causal_lm
    assert causal_lm.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), attention_for_gradients(causal_lm):
        assert causal_lm.config._attn_implementation == "eager"
        raise KeyError
    assert causal_lm.config._attn_implementation == "sdpa"


def test_the_states_are_the_same_and_causal_without_a_mask(make_base: Callable[..., SharedBase]) -> None:
    causal_lm = make_base().causal_lm
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = causal_lm(input_ids=ids).logits
        with attention_for_gradients(causal_lm):
            plain = causal_lm(input_ids=ids).logits
            shorter = causal_lm(input_ids=ids[:, :4]).logits
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[:, :4], shorter, rtol=1e-5, atol=1e-5)


def test_a_model_with_another_attention_keeps_it(make_base: Callable[..., SharedBase]) -> None:
    causal_lm = make_base().causal_lm
    causal_lm.set_attn_implementation("eager")
    with attention_for_gradients(causal_lm):
        assert causal_lm.config._attn_implementation == "eager"
    assert causal_lm.config._attn_implementation == "eager"
