"""Attention for CPUs: grouped queries against their shared keys, as plain matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

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


def use_grouped_attention(model: Any) -> None:
    """Let `model` use `grouped_attention` where it is on the CPU and would use torch's fused one.

    On CPUs the fused one repeats keys and values for grouped queries where there is a mask, and its backward is slow.
    """
    known = model.config.model_type in PLAIN_MODELS  # others may cap or sink their scores
    if known and model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, eager_mask)
        model.set_attn_implementation(GROUPED)
