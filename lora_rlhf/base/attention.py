"""Attention of grouped queries against their shared keys as plain matrix products: on CPUs, and for decoding on cards.

Torch's fused attention repeats keys and values for grouped queries where there is a mask. For one new token per row
that is most of what is read: the whole cache of keys and values is copied several times over.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from lora_rlhf.base.devices import AMPERE

PLAIN_MODELS = ("llama", "mistral", "qwen2")
"""Model types with plain attention, whose trunk is embeddings, layers and norm with nothing in between."""
GROUPED = "lora_rlhf_grouped"
"""Name under which transformers finds this attention."""


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(scaling · QKᵀ + mask) V as [batch, queries, heads, width], softmax in float32.

    The query heads that share a key head are rows of one product, so that keys and values are never repeated.

    Args:
        module: the attention layer; unused.
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width].
        value: as `key`.
        attention_mask: [batch or 1, 1, queries, keys], added to the scores.
        scaling: usually 1/√width.
    """
    batch, heads, queries, width = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch, shared, heads // shared * queries, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, shared, heads // shared, queries, -1) * scaling
    if scores.dtype == torch.float16:  # a mask of its smallest number and a low score are -∞, and all of a row NaN
        scores = scores.float()
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None]
    probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = probs.view(batch, shared, heads // shared * queries, -1) @ value
    return mixed.view(batch, heads, queries, -1).transpose(1, 2), None


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Return grouped attention on a CPU, and on a card for one query per row under a mask; else torch's fused one."""
    decoding = query.shape[2] == 1 and attention_mask is not None
    if decoding or query.device.type == "cpu":
        return grouped_attention(module, query, key, value, attention_mask, scaling)
    if attention_mask is None and not fused_with_shared_keys(query.device):
        return attention_of_repeated_keys(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)


@functools.cache
def fused_with_shared_keys(device: torch.device) -> bool:
    """Return whether torch has a fused kernel for query heads that share keys: from Ampere on.

    On cards before it, torch would hold the scores of all queries and keys instead.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE


def attention_of_repeated_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return causal attention by torch's fused kernel, with a copy of keys and values for every query head.

    Shapes and result are those of `grouped_attention`; without a mask, a single query sees all keys.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    fused = nn.functional.scaled_dot_product_attention
    return fused(query, key, value, is_causal=query.shape[2] > 1, scale=scaling).transpose(1, 2)


def attention_mask(*, q_length: int, device: torch.device | str, dtype: torch.dtype, **rest: Any) -> Any:
    """Return the mask that `attention` wants: added to the scores where it is grouped, else of booleans, or None."""
    if torch.device(device).type == "cpu":
        return eager_mask(q_length=q_length, device=device, dtype=dtype, **rest)
    mask = sdpa_mask(q_length=q_length, device=device, **rest)
    return mask if mask is None or q_length > 1 else added_to_scores(mask, dtype)


def added_to_scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to attention's scores: 0 where `mask` is true, else the least number of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def use_grouped_attention(model: Any) -> None:
    """Let `model` use `attention` where it would use torch's fused one; a model of unsloth has its own."""
    known = model.config.model_type in PLAIN_MODELS  # others may cap or sink their scores
    if known and model.config._attn_implementation == "sdpa" and not hasattr(model, "for_inference"):
        AttentionInterface.register(GROUPED, attention)
        AttentionMaskInterface.register(GROUPED, attention_mask)
        model.set_attn_implementation(GROUPED)
