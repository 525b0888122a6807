"""Linear, norm and MLP layers that compute what transformers' and PEFT's do, with less memory and fewer passes.

A frozen base needs no gradient of its own weights, so little has to be kept for backward: an adapted linear layer keeps
its input and the low-rank product, a plain one nothing, a norm its input and one number per row, an MLP the two halves
of its gate. All of it is stock torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_rlhf.base.attention import PLAIN_MODELS

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
"""Norms of transformers with w · x / √(mean x² + ε), computed in float32."""
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
"""MLPs of transformers with down(act(gate(x)) · up(x))."""


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + b + s · (x Aᵀ) Bᵀ [tokens, out], W frozen and made anew in backward; x is kept for the adapter alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        if a is None or b is None:
            return _product(x, weight(), bias, None, None, scaling)[0]
        ctx.master_dtype = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)  # kept for backward, which would cast them once more
        y, low = _product(x, weight(), bias, a, b, scaling)
        ctx.save_for_backward(x, low, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: with checkpointing, a second look would compute anew
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dy @ ctx.weight() if ctx.needs_input_grad[0] else None
        da = db = None
        if kept:
            x, low, a, b = kept
            back = (dy @ b).mul_(ctx.scaling)
            if dx is not None:
                dx.addmm_(back, a)
            if ctx.needs_input_grad[3]:
                da = (back.T @ x.reshape(-1, x.shape[-1])).to(ctx.master_dtype)
                db = (dy.T @ low).mul_(ctx.scaling).to(ctx.master_dtype)
        return None if dx is None else dx.view(ctx.shape), None, None, da, db, None


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    flat = x.reshape(-1, x.shape[-1])
    y = nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    low = None if a is None or b is None else add_low_rank(y, flat, (a, b, scaling))
    return y, low


def add_low_rank(y: torch.Tensor, x: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
    """Add s · (x Aᵀ) Bᵀ to `y` [..., out] in place, without gradient; return x Aᵀ [rows, rank].

    Args:
        y: contiguous, in the dtype of `x`.
        x: [..., in].
        adapter: A [rank, in], B [out, rank] and s.
    """
    a, b, scaling = adapter
    low = x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T
    y.view(-1, y.shape[-1]).addmm_(low, b.to(x.dtype).T, alpha=scaling)
    return low


def lora_linear(
    x: torch.Tensor,
    weight: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """Return x Wᵀ + bias + s · (x Aᵀ) Bᵀ, [..., out] in the dtype of `x`.

    Args:
        x: [..., in] in the compute dtype.
        weight: returns W [out, in] in that dtype; called once in forward and once in backward.
        bias: [out], frozen, or none.
        adapter: A [rank, in], B [out, rank] (float32 masters; products in the dtype of `x`) and s; or none.
    """
    a, b, scaling = adapter or (None, None, 0.0)
    if torch.is_grad_enabled() and (x.requires_grad or (a is not None and a.requires_grad)):
        y = _LoraLinear.apply(x, weight, bias, a, b, scaling)
    else:
        y = _product(x, weight(), bias, a, b, scaling)[0]
    return y.view(*x.shape[:-1], y.shape[-1])  # out here: no model may add in place to a view that a Function returns


class _RmsNorm(torch.autograd.Function):
    """w · x / √(mean x² + ε) over the last dimension, in float32, w frozen; the result has the dtype of w.

    With x̂ = x / √(mean x² + ε), dx = (w · dy − x̂ · mean(w · dy · x̂)) / √(mean x² + ε): of x, x̂ is enough.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        unit, scale = _scaled_to_unit(x, eps)
        ctx.save_for_backward(unit.to(weight.dtype, copy=True), scale, weight)
        ctx.dtype = x.dtype
        return unit.mul_(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        unit, scale, weight = ctx.saved_tensors
        straight = grads[0].float() * weight
        along = torch.linalg.vecdot(straight, unit.float())[..., None].div_(unit.shape[-1])
        return straight.addcmul_(unit, along, value=-1).mul_(scale).to(ctx.dtype), None, None


def _scaled_to_unit(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x / √(mean x² + ε), 1 / √(mean x² + ε)) over the last dimension, in float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
    return x * scale, scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return w · x / √(mean x² + ε), computed in float32 and rounded once, to the dtype of w; w takes no gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RmsNorm.apply(x, weight, eps)
    return _scaled_to_unit(x, eps)[0].mul_(weight).to(weight.dtype)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up; silu is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_up = nn.functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), d_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up, keeping just these two for backward."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGlu.apply(gate, up)
    return nn.functional.silu(gate).mul_(up)


def make_norms_and_mlps_lean(trunk: nn.Module) -> None:
    """Give the norms and gated MLPs of a frozen transformers model the functions above.

    Others stay as they are, and so do classes whose forward somebody else has replaced (unsloth does).
    """
    for module in trunk.modules():
        kind = _stock_class(module)
        if kind in NORMS:
            module.forward = _norm_forward(module)
        elif kind in GATED_MLPS and isinstance(module.act_fn, nn.SiLU | type(_silu())):
            module.forward = _mlp_forward(module)


def keep_residuals_in_float32(model: nn.Module) -> None:
    """Let the trunk of a 16-bit model add up the outputs of its layers in float32; its products stay in 16 bits.

    Every layer adds a little to a sum that grows; rounded to bfloat16 after each addition, it loses what was small.
    That was half of the noise in a token's probability ratio. The norms, which are lean, round what enters a product.
    Models of other types than `PLAIN_MODELS`, and those of other backends, are left alone.
    """
    for module in model.modules():
        plain = getattr(getattr(module, "config", None), "model_type", None) in PLAIN_MODELS
        parts = dict(module.named_children())
        if plain and {"embed_tokens", "rotary_emb"} <= parts.keys() and _stock_class(parts["rotary_emb"]):
            _keep_residual_in_float32(parts["embed_tokens"], parts["rotary_emb"])


def _keep_residual_in_float32(embedding: Any, rotary: Any) -> None:
    dtype = embedding.weight.dtype
    if dtype == torch.float32:
        return
    embed, angles = embedding.forward, rotary.forward
    embedding.forward = lambda ids: embed(ids).float()
    # sines and cosines have the dtype of what they are made for, and would make queries and keys float32
    rotary.forward = lambda x, position_ids: angles(x.new_empty(0, dtype=dtype), position_ids=position_ids)


def _stock_class(module: nn.Module) -> str:
    """Return the name of a module's class if its forward is transformers' own, else nothing."""
    return type(module).__name__ if type(module).forward.__module__.startswith("transformers.") else ""


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


def _norm_forward(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rms_norm(x, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
