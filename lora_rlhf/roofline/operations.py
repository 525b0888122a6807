"""Counting operations on shapes: kernels, bytes, floating-point operations, waits for the host, and live memory.

`OperationCounter` lets code that is written for a card run on torch's meta device, where tensors have a shape and no
numbers. Whole numbers and masks stay real, because lengths and loops depend on them: they lie on the CPU, and it is
remembered which of them would lie on the card.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
REAL = (torch.int64, torch.int32, torch.bool)
"""Kinds of numbers that are computed; all others are shapes alone."""
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "baddbmm": (1, 2)}
"""Matrix products, and which of their arguments are the two factors."""
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITING = ("copy_", "fill_", "zero_")
ALLOCATION_BLOCK = 512
"""Torch's allocator on CUDA gives memory in multiples of this, in bytes."""
UNKNOWN_NUMBER = 0.01
"""What the host reads where it asks for a number that is not there: a small one, as losses are."""
HOST_READS = ("tolist", "cpu", "numpy")
"""Methods of a tensor that bring it to the host, and that torch runs without an operation where it is there already."""


@dataclass(frozen=True)
class Operation:
    """One operation as a card would run it.

    Attributes:
        name: torch's name for it.
        kind: matrix products, 4-bit weights, attention, or everything else ("elementwise").
        bytes: read and written, each tensor once.
        flops: of matrix products and attention; 0 for what is limited by memory alone.
        kernels: that are launched.
    """

    name: str
    kind: str
    bytes: float
    flops: float = 0.0
    kernels: int = 1

    def seconds(self, bandwidth: float, matmul: float) -> float:
        """Return the least time it takes: that of its bytes or of its arithmetic, whichever is longer."""
        return max(self.bytes / bandwidth, self.flops / matmul)


class OperationCounter(TorchDispatchMode):
    """Counts what runs inside its `with` block.

    Args:
        fused_4bit: returns whether the card multiplies by 4-bit weights without dequantising them first, given the
            dtype, rows, outputs and inputs of a product.

    Attributes:
        operations: in the order in which they ran, since the last `clear`.
        syncs: how often the host waited for the card, by the operation that made it wait, since the last `clear`.
        live: bytes that are allocated now.
        peak: most bytes that were allocated at one time since the last `clear`.
    """

    def __init__(self, fused_4bit: Callable[[torch.dtype, int, int, int], bool] = lambda *_: False) -> None:
        super().__init__()
        self.fused_4bit = fused_4bit
        self.operations: list[Operation] = []
        self.syncs: Counter[str] = Counter()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._reads = _HostReads(self)

    def __enter__(self) -> OperationCounter:
        """Begin to count."""
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End counting."""
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def clear(self) -> None:
        """Begin to count anew; what is allocated stays so."""
        self.operations, self.syncs, self.peak = [], Counter(), self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on shapes and note it."""
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_card, shapes = any(map(self.is_on_card, tensors)), any(t.is_meta for t in tensors)
        if on_card and name in ("_local_scalar_dense", "equal"):
            self.syncs[{"equal": "equal", "_local_scalar_dense": "item"}[name]] += 1
            if shapes:
                return UNKNOWN_NUMBER if args[0].is_floating_point() else 0
        if name == "_to_copy" and (moved := self._moved(args[0], kwargs)) is not None:
            return moved
        if name == "gemm_4bit":
            return self._product_4bit(*args[:3])
        if on_card and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._without_masks(args[1]), *args[2:])
        if not tensors or kwargs.get("device") is not None:
            return self._created(func, name, args, kwargs)
        if shapes:
            written = args[0] if func._schema.is_mutable else None
            real = isinstance(written, torch.Tensor) and not written.is_meta  # its numbers are then unknown, and 0
            args, kwargs = tree_map(_as_real if real else _as_shape, (args, kwargs))
        out = func(*args, **kwargs)
        return self._noted(func, name, args, kwargs, out) if on_card else out

    def is_on_card(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor would lie on the card: one without numbers, or of whole numbers made there."""
        return tensor.is_meta or _storage(tensor) in self._sizes

    def _moved(self, tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Return a copy that goes to the card or comes from it; None where `_to_copy` only changes the dtype."""
        if kwargs.get("device") is None:
            return None
        to_card = torch.device(kwargs["device"]).type == "meta"
        dtype = kwargs.get("dtype") or tensor.dtype
        if tensor.is_meta and not to_card:
            self.syncs["copy to the host"] += 1
            return torch.zeros(tensor.shape, dtype=dtype)
        if to_card and not tensor.is_meta:
            whole = dtype in REAL
            return self._allocated(tensor.to(dtype, copy=True) if whole else _shape_of(tensor, dtype))
        return None

    def _created(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation that makes a tensor: on the CPU where it is of whole numbers, else as a shape."""
        to_card = torch.device(kwargs.get("device") or "cpu").type == "meta"
        args = tree_map(_as_shape, args) if to_card else args
        out = func(*args, **kwargs)
        if to_card and isinstance(out, torch.Tensor) and out.dtype in REAL:
            kwargs["device"] = torch.device("cpu")
            out = func(*tree_map(_as_real, args), **kwargs)
        return self._noted(func, name, args, kwargs, out) if to_card else out

    def _without_masks(self, indices: Sequence[Any]) -> list[Any]:
        """Return `indices` with masks as numbers of places, which a card has to count before the host goes on."""
        numbers: list[Any] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                self.syncs["index by a mask"] += 1
                self.operations.append(Operation("nonzero", "elementwise", index.numel(), kernels=4))
                numbers += index.nonzero(as_tuple=True)
            else:
                numbers.append(index)
        return numbers

    def _product_4bit(self, x: torch.Tensor, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Note bitsandbytes' product of x [..., in] with a 4-bit weight [out, in], as the card would do it."""
        outputs, inputs = shape[0], x.shape[-1]
        rows, width = x.numel() // inputs, x.element_size()
        weights = outputs * inputs
        io = width * rows * (inputs + outputs)
        flops = 2.0 * rows * weights
        out = self._allocated(torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=META))
        if self.fused_4bit(x.dtype, rows, outputs, inputs):
            self.operations.append(Operation("fused 4-bit product", "4-bit weights", weights * 33 / 64 + io, flops))
            return out
        scales = weights / 64
        self.operations += [
            Operation("scales of 4-bit weights", "4-bit weights", scales * 13, kernels=2),
            Operation("dequantize_4bit", "4-bit weights", weights / 2 + 4 * scales + width * weights),
            Operation("mm", "matrix products", width * weights + io, flops),
        ]
        self.peak = max(self.peak, self.live + int(width * weights + 4 * scales))
        return out

    def _noted(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Note an operation that has run, and return `out` with whole numbers as real tensors."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        mutable = func._schema.is_mutable
        storages = {_storage(t) for t in given}
        if not mutable and made and all(_storage(t) in storages for t in made):
            return out  # a view
        if name not in ALLOCATIONS:
            self.operations.append(_operation(name, args, given, made, mutable))
        return tree_map(lambda leaf: self._kept(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.is_meta and tensor.dtype in REAL
        return self._allocated(torch.zeros(tensor.shape, dtype=tensor.dtype) if whole else tensor)

    def _allocated(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` after counting its memory, until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = math.ceil(storage.nbytes() / ALLOCATION_BLOCK) * ALLOCATION_BLOCK
            self._sizes[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class _HostReads(TorchFunctionMode):
    """Sees what no operation shows: waits for tensors that lie on the CPU here alone, and numbers of `torch.tensor`."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch; note where it waits for the card."""
        name = getattr(func, "__name__", "")
        if name in HOST_READS and not args[0].is_meta and self.counter.is_on_card(args[0]):
            self.counter.syncs[name] += 1
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(META)  # else it would forget the numbers
        return func(*args, **kwargs)


def _shape_of(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype, device=META)


def _as_shape(leaf: Any) -> Any:
    return _shape_of(leaf, leaf.dtype) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf


def _as_real(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; an expanded one is read where it really lies."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _operation(name: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor], mutable: bool) -> Operation:
    if "scaled_dot_product" in name:
        return _attention(name, args, given, made)
    moved = sum(map(_bytes, given))
    if name in OVERWRITING:
        pass  # what is overwritten is not read
    elif mutable:
        moved += _bytes(given[0]) if name != "_fused_adam_" else sum(map(_bytes, given)) * 3 // 4
    else:
        moved += sum(map(_bytes, made))
    if name in PRODUCTS:
        left, right = (args[i] for i in PRODUCTS[name])
        return Operation(name, "matrix products", moved, 2.0 * left.numel() * right.shape[-1])
    if name == "embedding" or name.startswith("index"):  # of the table, only the rows that are asked for
        rows = made[0] if not mutable else args[2]
        return Operation(name, "elementwise", 2 * _bytes(rows))
    kind = "4-bit weights" if "dequantize" in name else "elementwise"
    kernels = max(1, len(given) // 120) if name == "_fused_adam_" else 1
    return Operation(name, kind, moved, kernels=kernels)


def _attention(name: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> Operation:
    """Note fused attention: causal over the prompt (half of the products), whole for one new token."""
    backward = "backward" in name
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    flops = 4.0 * query.numel() * key.shape[2] * (2.5 if backward else 1.0)
    if query.shape[2] > 1:
        flops /= 2
    return Operation(name, "attention", sum(map(_bytes, given)) + sum(map(_bytes, made)), flops, 3 if backward else 1)
