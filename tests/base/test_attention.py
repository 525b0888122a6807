"""Grouped attention is the attention that transformers computes; what it is used for on a CPU and on a card."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from lora_rlhf.base.attention import (
    GROUPED,
    added_to_scores,
    attention,
    attention_mask,
    attention_of_repeated_keys,
    grouped_attention,
    use_grouped_attention,
)
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.roofline.cards import CARDS
from lora_rlhf.roofline.operations import META, OperationCounter
from lora_rlhf.roofline.shapes_only import fused_attention


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7)], ids=["prefill", "decoding"])
def test_it_equals_transformers_plain_attention_with_gradients(queries: int, keys: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, queries), (2, keys), (2, keys)))
    mask = torch.zeros(2, 1, queries, keys)
    mask[1, :, :, :2] = torch.finfo(torch.float32).min
    results = []
    for computed in (grouped_attention, eager_attention_forward):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        module = SimpleNamespace(num_key_value_groups=3, training=False)
        out, _ = computed(module, *inputs, mask if masked else None, scaling=8**-0.5)
        (out * torch.arange(8.0)).sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_low_scores_in_a_row_that_is_masked_as_a_whole_are_no_nan_in_float16() -> None:
    """The mask is the smallest number of the dtype; transformers' own attention has infinity there, and then NaN."""
    q, k, v = torch.full((1, 2, 3, 8), 8.0), torch.full((1, 1, 3, 8), -8.0), torch.ones(1, 1, 3, 8)
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float16).min).triu(1).half()
    mask[..., 0, :] = torch.finfo(torch.float16).min  # the first token is padding
    out, _ = grouped_attention(None, q.half(), k.half(), v.half(), mask, scaling=8**-0.5)
    torch.testing.assert_close(out, torch.ones(1, 3, 2, 8).half(), rtol=1e-3, atol=0)


def test_a_shared_base_on_the_cpu_uses_it_and_gives_the_same_logits(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig]
) -> None:
    ours, stock = make_base().causal_lm, load_causal_lm(make_config())
    assert ours.config._attn_implementation == GROUPED and stock.config._attn_implementation == "sdpa"
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad(), make_base().role("reference"):
        for given in (None, mask):
            before = stock(input_ids=ids, attention_mask=given).logits
            use_grouped_attention(stock)
            after = stock(input_ids=ids, attention_mask=given).logits
            stock.set_attn_implementation("sdpa")
            torch.testing.assert_close(after[:, -1], before[:, -1], rtol=1e-5, atol=1e-5)


def test_a_model_with_another_attention_keeps_it(make_config: Callable[..., RunConfig]) -> None:
    model = load_causal_lm(make_config())
    model.set_attn_implementation("eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_mask_is_added_as_nothing_or_as_the_least_number() -> None:
    mask = added_to_scores(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


@pytest.mark.parametrize(
    ("queries", "padded", "kind"),
    [(1, True, torch.bfloat16), (1, False, None), (5, True, torch.bool), (5, False, None)],
    ids=["decoding under padding", "decoding", "prefill under padding", "prefill"],
)
def test_on_a_card_the_mask_is_a_sum_for_single_queries_and_torchs_own_for_others(
    queries: int, padded: bool, kind: torch.dtype | None
) -> None:
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[0, 0] = not padded
    with OperationCounter():  # in which the meta device stands for a card
        mask = attention_mask(
            batch_size=2, q_length=queries, kv_length=5, q_offset=5 - queries, kv_offset=0,
            attention_mask=seen.to(META), dtype=torch.bfloat16, device=META,
        )  # fmt: skip
    assert kind is None if mask is None else mask.dtype == kind


@pytest.mark.parametrize(("queries", "masked", "repeated"), [(1, True, 0), (7, True, 2), (1, False, 0)])
def test_on_a_card_single_queries_under_a_mask_do_not_repeat_keys_and_values(
    queries: int, masked: bool, repeated: int
) -> None:
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    with OperationCounter() as counter, fused_attention(CARDS["rtx4090"]):
        q, k, v = (torch.empty(2, heads, n, 8, device=META) for heads, n in ((6, queries), (2, 7), (2, 7)))
        mask = torch.zeros(2, 1, queries, 7, device=META) if masked else None
        counter.clear()
        out, _ = attention(module, q, k, v, mask, scaling=8**-0.5)
    assert out.shape == (2, queries, 6, 8)
    assert [op.name for op in counter.operations].count("clone") == repeated


@pytest.mark.parametrize("queries", [1, 5])
def test_repeated_keys_give_what_grouped_ones_give(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, queries), (2, 5), (2, 5)))
    causal = torch.ones(1, 1, queries, 5, dtype=torch.bool).tril(5 - queries)
    expected, _ = grouped_attention(None, q, k, v, added_to_scores(causal, torch.float32), scaling=0.3)
    torch.testing.assert_close(attention_of_repeated_keys(q, k, v, scaling=0.3), expected)


def test_before_ampere_keys_are_repeated_for_the_kernel_that_saves_memory() -> None:
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    kernels = {}
    for name in ("t4", "rtx4090"):
        with OperationCounter() as counter, fused_attention(CARDS[name]):
            q, k, v = (torch.empty(2, heads, 7, 8, device=META) for heads in (6, 2, 2))
            attention(module, q, k, v, None, scaling=8**-0.5)
        kernels[name] = [op.name for op in counter.operations if op.kind == "attention"]
    flash, efficient = (f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient"))
    assert kernels == {"t4": [efficient], "rtx4090": [flash]}


def test_a_model_of_unsloth_keeps_its_attention(make_config: Callable[..., RunConfig]) -> None:
    model = load_causal_lm(make_config())
    model.for_inference = lambda: None
    use_grouped_attention(model)
    assert model.config._attn_implementation == "sdpa"
