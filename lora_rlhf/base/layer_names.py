"""Which linear layers of a model get an adapter and which are held in 4 bits, in words for those who chose them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_rlhf.base.prequantized import stored_precision
from lora_rlhf.errors import UserError, first_line

_LAYER = re.compile(r"\.\d+\.")
MOST_WHOLE = 0.5
"""Share of the weights inside the layers that may stay whole in a 4-bit base before it is said."""


def linear_names(model: nn.Module) -> list[str]:
    """Return the names, without their path, of the linear layers inside a model's layers, in the order of the model."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path, _ in _linears(model)))


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        plain = path.replace(".base_layer", "")
        if isinstance(module, nn.Linear) and ".lora_" not in path and _LAYER.search(plain):
            yield plain, module


def cannot_adapt(causal_lm: Any, wanted: Iterable[str], error: object) -> UserError:
    """Return the error for people where PEFT does not adapt a model.

    Args:
        causal_lm: the model.
        wanted: `lora.target_modules`.
        error: PEFT's own.
    """
    names = linear_names(causal_lm)
    if set(names) & set(wanted):
        said = first_line(error).rpartition("] ")[2].partition(". ")[0]
        return UserError(f"lora.target_modules: PEFT adapts none of them: {said}")
    text = f"lora.target_modules: this model has none of {', '.join(wanted)}"
    if names:
        return UserError(f"{text}. Its linear layers are these: set lora.target_modules: [{', '.join(names)}]")
    inside = {type(m).__name__ for path, m in causal_lm.named_modules() if _LAYER.search(path) and _is_matrix(m)}
    kinds = f"its layers hold their weights as {', '.join(sorted(inside))}" if inside else "it has no layers"
    return UserError(f"{text}, and {kinds}, where no linear layer is: choose another model")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() > 1


def check_no_experts(causal_lm: Any, lora: LoraConfig, wanted: Iterable[str]) -> None:
    """Raise `UserError` where PEFT adapts stacked experts, which all roles would share: they are no linear layers.

    Args:
        causal_lm: adapted by PEFT.
        lora: the adapter's config, as PEFT has changed it.
        wanted: the modules that it named before.
    """
    if not getattr(lora, "target_parameters", None):
        return
    experts = [name for name in wanted if name not in set(lora.target_modules or ())]
    others = [name for name in linear_names(causal_lm) if name not in experts]
    raise UserError(
        f"lora.target_modules: {', '.join(experts)} are this model's experts, stacked in one tensor, where several "
        f"roles cannot have adapters side by side. Set lora.target_modules: [{', '.join(others)}]"
    )


def base_description(causal_lm: Any, device: torch.device) -> list[str]:
    """Return lines for people on a loaded, adapted base: class, precision and size, and what may surprise."""
    weights = {n: p for n, p in causal_lm.named_parameters() if "lora_" not in n}
    size = sum(p.numel() * p.element_size() for p in weights.values())
    stored = stored_precision(causal_lm)
    lines = [f"{type(causal_lm).__name__}, {stored}: {size / 2**20:,.1f} MiB of weights on {device}"]
    return lines + _unadapted(causal_lm) + _whole(weights)


def _unadapted(causal_lm: Any) -> list[str]:
    """Return a line where the adapters leave some linear layers out."""
    layers = [module for module in causal_lm.modules() if isinstance(module, LoraLayer)]
    held = {id(layer.get_base_layer()) for layer in layers}
    names = [(path.rpartition(".")[2], id(module) in held) for path, module in _linears(causal_lm)]
    adapted = list(dict.fromkeys(name for name, has in names if has))
    left_out = list(dict.fromkeys(name for name, has in names if not has and name not in adapted))
    if not left_out:
        return []
    return [
        f"{len(adapted)} of {len(adapted) + len(left_out)} kinds of linear layers in a block get an adapter "
        f"({', '.join(adapted)}); without one: {', '.join(left_out)}. lora.target_modules chooses them"
    ]


def _whole(weights: dict[str, nn.Parameter]) -> list[str]:
    """Return a line where most weights inside the layers of a 4-bit base are not in 4 bits: stacked experts are not."""
    inside = {n: p for n, p in weights.items() if _LAYER.search(n)}
    packed = sum(2 * p.numel() for p in inside.values() if getattr(p, "quant_state", None) is not None)
    whole = {n: p for n, p in inside.items() if getattr(p, "quant_state", None) is None and p.dim() > 1}
    count = sum(p.numel() for p in whole.values())
    if not packed or count <= MOST_WHOLE * (packed + count):
        return []
    size, name = sum(p.numel() * p.element_size() for p in whole.values()), max(whole, key=lambda n: whole[n].numel())
    return [
        f"only {packed / (packed + count):.0%} of the weights inside the layers are in 4 bits: bitsandbytes leaves "
        f"stacked experts ({name.rpartition('.')[2]} and the like) whole, which take {size / 2**30:,.1f} GiB"
    ]
