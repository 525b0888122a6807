"""The sizes of a causal language model, from its config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.known_shapes import shape_config
from lora_rlhf.base.prequantized import is_quantized
from lora_rlhf.config import RunConfig

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, an 8-bit scale for 64 of them, and a float32 one for 256 scales (double quantisation)."""


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: its number in the stack, its name in the layer, its sizes, and bytes per weight in 4 bits."""

    layer: int
    name: str
    inputs: int
    outputs: int
    bytes_in_4_bits: float = NF4_BYTES


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model.

    Attributes:
        linears: linear layers inside the transformer layers; these are what 4 bits hold.
        other: parameters outside of them: embeddings, norms, an LM head of its own.
        hidden: width of the states.
        heads: query heads.
        key_width: key heads times their width.
        query_width: query heads times their width.
        layers: transformer layers.
        vocabulary: rows of the LM head.
    """

    linears: tuple[LinearShape, ...]
    other: int
    hidden: int
    heads: int
    key_width: int
    query_width: int
    layers: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Parameters of all linear layers."""
        return sum(one.inputs * one.outputs for one in self.linears)

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return max((max(one.inputs, one.outputs) for one in self.linears), default=4 * self.hidden)


def model_shape(config: RunConfig) -> ModelShape:
    """Return the shape of the run's base; only its config file is read.

    Raises:
        UserError: the model's config cannot be had.
    """
    from transformers import AutoModelForCausalLM

    return shape_of(shape_config(config), AutoModelForCausalLM)


def shape_of(config: Any, auto_class: Any) -> ModelShape:
    """Return the shape of the model that a transformers config describes, built without memory for its weights."""
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (place := re.search(r"\.(\d+)\.", name)):
            sizes = module.in_features, module.out_features
            linears.append(LinearShape(int(place[1]), name.rpartition(".")[2], *sizes, bytes_in_4_bits(config, name)))
    body = sum(one.inputs * one.outputs for one in linears)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        linears=tuple(linears),
        other=model.num_parameters() - body,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_width=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width,
        query_width=config.num_attention_heads * width,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


def bytes_in_4_bits(config: Any, name: str) -> float:
    """Return what a weight of the layer `name` takes in 4 bits: as we quantise it, or as a checkpoint holds it."""
    published = getattr(config, "quantization_config", None) or {"bnb_4bit_use_double_quant": True}
    if not is_quantized(published, name):
        return 2.0
    return NF4_BYTES if published.get("bnb_4bit_use_double_quant") else 0.5 + 4 / 64
