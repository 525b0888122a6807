"""The linear layers of a shared base: a frozen weight, in 4 bits or as a 16-bit working copy, and a role's adapter."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_rlhf.base.lean_layers import (
    add_low_rank,
    keep_residuals_in_float32,
    lora_linear,
    make_norms_and_mlps_lean,
)
from lora_rlhf.free_memory import free_bytes

FOLD_ERROR = 0.3
"""By how much of its size rounding may change an adapter's update, or it is not folded into a 16-bit copy."""
FOLD_ROWS = 64
"""Rows of a weight on which that is measured."""


class FrozenLinear:
    """The forward of a frozen linear layer; `copy` [out, in], where there is one, takes the place of its weight."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.stock = layer.forward
        self.copy: torch.Tensor | None = None
        self.packed: torch.Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in 4 bits."""
        return getattr(self.layer.weight, "quant_state", None) is not None

    def weight(self) -> torch.Tensor:
        """Return the weight [out, in] in the compute dtype: the copy, or the layer's own, dequantised now."""
        return dequantized_weight(self.layer).to(self.dtype) if self.copy is None else self.copy

    def product(self, x: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor, float] | None) -> torch.Tensor:
        """Return `lora_linear` of this layer; without gradient, bitsandbytes' own 4-bit product where there is one."""
        x = x.to(self.dtype)
        if self.packed is not None:
            bias = None if self.layer.bias is None else self.layer.bias.to(self.dtype)
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        elif self.copy is None and not torch.is_grad_enabled() and self.is_quantized:
            y = self.stock(x)
        else:
            return lora_linear(x, self.weight, self.layer.bias, adapter)
        if adapter is not None:
            add_low_rank(y, x, adapter)
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product without adapter."""
        return self.product(x, None)


class RoleLinear:
    """The forward of a PEFT layer on a frozen linear one: the adapter of the role that is played, and no other.

    Where several roles are played at once, each on its rows, the frozen product is taken once for all of them.
    """

    def __init__(self, layer: Any, frozen: FrozenLinear, playing: Callable[[], str | MixedRoles]) -> None:
        self.layer, self.frozen, self.playing = layer, frozen, playing
        self.folded = False
        self.cast: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the output of the role, or of each row's own."""
        playing = self.playing()
        if isinstance(playing, str):
            return self.frozen.product(x, None if self.folded else self.adapter(playing))
        y = self.frozen.product(x, None)
        playing.add_adapters(self, x.to(y.dtype), y)
        return y

    def adapter(self, role: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return (A, B, scaling) of a role to compute with, or None where it has no adapter here.

        A and B are the float32 parameters, or their copies in the compute dtype inside `RoleLayers.adapters_cast`.
        """
        return self.cast.get(role) or self.master(role)

    def master(self, role: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return (A, B, scaling) of a role with the float32 parameters, or None where it has no adapter here."""
        if role not in self.layer.lora_A:
            return None
        return self.layer.lora_A[role].weight, self.layer.lora_B[role].weight, self.layer.scaling[role]


Factors = tuple[torch.Tensor, torch.Tensor, tuple[tuple[str, int, float], ...]]
"""A [Σ rank, in] and B [out, Σ rank] of several roles side by side, and (role, rank, scaling) of each part."""


class MixedRoles:
    """Who is played on which row of a batch.

    Args:
        roles: of each row.
        side_by_side: from `RoleLayers.side_by_side`, for many passes with adapters that do not change: one product with
            the factors of all roles takes the place of one for each, and they are cast once.
    """

    def __init__(self, roles: Sequence[str], side_by_side: Mapping[RoleLinear, Factors] | None = None) -> None:
        self.roles, self.factors = tuple(roles), side_by_side
        ends = list(itertools.accumulate(len(list(same)) for _, same in itertools.groupby(roles)))
        self.spans = [(roles[end - 1], slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
        self._scales: dict[tuple[tuple[str, int, float], ...], torch.Tensor] = {}

    def add_adapters(self, layer: RoleLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to `y` [rows, length, out] what each row's adapter makes of `x` [rows, length, in], without gradient.

        Mixtures of experts hand their shared experts all tokens in one dimension [rows · length, in], row after row.
        """
        x, y = x.reshape(len(self.roles), -1, x.shape[-1]), y.view(len(self.roles), -1, y.shape[-1])
        if self.factors is None:
            for role, rows in self.spans:
                if (adapter := layer.adapter(role)) is not None:
                    add_low_rank(y[rows], x[rows], adapter)
        elif layer in self.factors:
            a, b, parts = self.factors[layer]
            low = (x @ a.T).mul_(self._scale(parts, x))
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.T)

    def _scale(self, parts: tuple[tuple[str, int, float], ...], like: torch.Tensor) -> torch.Tensor:
        """Return [rows, 1, Σ rank]: the scaling where a row has that role, else 0."""
        if parts not in self._scales:
            rows = [[s if own == role else 0.0 for own, rank, s in parts for _ in range(rank)] for role in self.roles]
            self._scales[parts] = torch.tensor(rows, dtype=like.dtype, device=like.device)[:, None]
        return self._scales[parts]


@dataclass(frozen=True)
class Folding:
    """What a 16-bit copy holds of the adapter that was folded into it.

    Attributes:
        layers: share of the adapted layers that hold it; in the others it stays beside the copy.
        error: mean of what rounding changes a layer's update by, were all of them folded, in shares of its size.
    """

    layers: float
    error: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Folding:
        """Return what follows from the error of each layer, of which there is one at least."""
        return cls(fmean(error <= FOLD_ERROR for error in errors), fmean(errors))


class RoleLayers:
    """All layers of a PEFT model whose forward is replaced by a leaner one that knows roles.

    Args:
        model: PEFT model on a frozen transformers model; its adapters are named after roles.
        playing: returns the role that is played, or several with their rows; a name without adapter plays the base.
        dtype: what products are computed in.

    Attributes:
        folding: what the working copy of the last sampling did to the adapter that was folded in; None where none was.
    """

    def __init__(self, model: nn.Module, playing: Callable[[], str | MixedRoles], dtype: torch.dtype) -> None:
        self.model, self.playing, self.dtype = model, playing, dtype
        self.device = next(model.parameters()).device
        self.frozen: dict[nn.Module, FrozenLinear] = {}
        self.adapted: dict[nn.Module, RoleLinear] = {}
        self.folding: Folding | None = None
        make_norms_and_mlps_lean(model)
        keep_residuals_in_float32(model)
        self.refresh()

    def refresh(self) -> None:
        """Take in layers that were adapted since."""
        wrapped = [
            m for m in self.model.modules() if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Linear)
        ]
        inner = {id(layer.get_base_layer()) for layer in wrapped}
        for module in self.model.modules():
            quantized = getattr(getattr(module, "weight", None), "quant_state", None) is not None
            if module not in self.frozen and not isinstance(module, LoraLayer) and (quantized or id(module) in inner):
                self.frozen[module] = module.forward = FrozenLinear(module, self.dtype)
        for layer in wrapped:
            if layer not in self.adapted:
                role = RoleLinear(layer, self.frozen[layer.get_base_layer()], self.playing)
                self.adapted[layer] = layer.forward = role

    def side_by_side(self, roles: Iterable[str]) -> dict[RoleLinear, Factors]:
        """Return copies of the adapters of `roles` in the compute dtype, side by side, for `MixedRoles`."""
        found: dict[RoleLinear, Factors] = {}
        wanted = list(dict.fromkeys(roles))
        for layer in self.adapted.values():
            held = [(role, *adapter) for role in wanted if (adapter := layer.adapter(role)) is not None]
            if held:
                a = torch.cat([a.detach() for _, a, _, _ in held]).to(self.dtype)
                b = torch.cat([b.detach() for _, _, b, _ in held], 1).to(self.dtype)
                found[layer] = (a, b, tuple((role, len(a), scaling) for role, a, _, scaling in held))
        return found

    @contextlib.contextmanager
    def adapters_cast(self, *roles: str) -> Iterator[None]:
        """Hold the adapters of `roles` in the compute dtype inside the block, so that no product casts them anew.

        For passes without gradient while the adapters do not change: the tokens of a rollout, the batches of scoring.
        """
        adapters = [(layer, role, layer.master(role)) for layer in self.adapted.values() for role in roles]
        try:
            for layer, role, adapter in adapters:
                if adapter is not None:
                    a, b, scaling = adapter
                    layer.cast[role] = (a.detach().to(self.dtype), b.detach().to(self.dtype), scaling)
            with torch.no_grad():
                yield
        finally:
            for layer, role, _ in adapters:
                layer.cast.pop(role, None)

    def copy_bytes(self) -> int:
        """Return what a working copy takes, at most: one with a role folded in."""
        return sum(f.layer.in_features * f.layer.out_features for f in self.frozen.values()) * self.dtype.itemsize

    def _can_pack(self) -> bool:
        """Return whether oneDNN can hold a copy in the order its products read it: a third faster for few rows."""
        op = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        return self.device.type == "cpu" and self.dtype == torch.bfloat16 and op is not None and mkldnn_has_bfloat16()

    def expands(self, wanted: bool | None) -> bool:
        """Return whether to hold a working copy: as wanted, and where that is left open, if memory has room."""
        return self.has_room_for_copy() if wanted is None else wanted

    def has_room_for_copy(self) -> bool:
        """Return whether free memory is at least twice what a working copy takes."""
        return free_bytes(self.device) > 2 * self.copy_bytes()

    def give_up_copy(self) -> None:
        """Go back to the layers' own weights; not while a role is folded in."""
        for frozen in self.frozen.values():
            frozen.copy = frozen.packed = None

    @contextlib.contextmanager
    def working_copy(self, folded_role: str | None = None) -> Iterator[None]:
        """Hold every weight in the compute dtype inside the block, so that no product dequantises.

        With `folded_role` its adapter is added to the weights. The sum is rounded to the compute dtype, so that
        log-probs differ slightly from those of base and adapter; no gradients then, and no other role. Where rounding
        would change a layer's update by more than `FOLD_ERROR` allows, as with the small updates of early steps, the
        adapter stays beside the copy.
        """
        try:
            self._make_copies(folded_role)
            yield
        finally:
            self.give_up_copy()
            for role in self.adapted.values():
                role.folded = False

    @contextlib.contextmanager
    def working_copy_where_room(self) -> Iterator[None]:
        """Hold a working copy inside the block, where memory has room for one; the numbers are the same."""
        with self.working_copy() if self.has_room_for_copy() else contextlib.nullcontext():
            yield

    def _make_copies(self, folded_role: str | None) -> None:
        """Fill the copies, views of one block of memory, which the system gets back whole; they alone hold it."""
        roles = {id(role.frozen): role for role in self.adapted.values()}
        errors: list[float] = []
        wanted = [f for f in self.frozen.values() if f.is_quantized or (folded_role and id(f) in roles)]
        sizes = [f.layer.in_features * f.layer.out_features for f in wanted]
        pack = folded_role is not None and self._can_pack()
        rooms = [] if pack else torch.empty(sum(sizes), dtype=self.dtype, device=self.device).split(sizes)
        for i, frozen in enumerate(wanted):
            weight, role = frozen.weight(), roles.get(id(frozen))
            if folded_role and role and (adapter := role.master(folded_role)):
                errors.append(folding_error(weight, adapter))
                role.folded = errors[-1] <= FOLD_ERROR
                weight = with_adapter(weight, adapter) if role.folded else weight
            if pack:
                frozen.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype))
            else:
                frozen.copy = rooms[i].view(weight.shape).copy_(weight)
        if errors:
            self.folding = Folding.of(errors)


def mkldnn_has_bfloat16() -> bool:
    """Return whether oneDNN has bfloat16 products for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_adapter(weight: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
    """Return W + s · B A [out, in], computed in float32 and not rounded to less."""
    a, b, scaling = adapter
    return weight.detach().to(torch.float32, copy=True).addmm_(b.detach(), a.detach(), alpha=scaling)


def folding_error(weight: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor, float]) -> float:
    """Return how far the update Δ = s · B A is changed when W + Δ is rounded to the dtype of `weight`.

    That is ‖round(W + Δ) − W − Δ‖ / ‖Δ‖, on at most `FOLD_ROWS` rows: 1 where every weight is rounded back to what it
    was, and nearly 0 in float32; 0 where there is no update.

    Args:
        weight: W [out, in], rounded already.
        adapter: A [rank, in], B [out, rank] and s.
    """
    a, b, scaling = (adapter[0].detach().float(), adapter[1].detach().float(), adapter[2])
    rows = slice(None, None, -(-len(b) // FOLD_ROWS))
    update, before = (b[rows] @ a).mul_(scaling), weight.detach()[rows].float()
    size = update.norm().item()
    rounded = (before + update).to(weight.dtype).float() - before
    return 0.0 if size == 0 else (rounded - update).norm().item() / size


def dequantized_weight(layer: Any) -> torch.Tensor:
    """Return the weight [out, in] that a linear layer computes with: a 4-bit one dequantised, else its own."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.data
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
