"""An adapter is folded into a 16-bit copy where that keeps its update, and stays beside the copy where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.base.role_layers import FOLD_ERROR, FOLD_ROWS, folding_error, with_adapter
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import RunConfig

MakeBase = Callable[..., SharedBase]
ULP = 2**-7
"""Between two numbers of bfloat16 from 1 to 2."""


@pytest.mark.parametrize(
    ("update", "error"),
    [
        ([ULP, ULP], 0.0),
        ([0.4 * ULP, -0.2 * ULP], 1.0),  # rounded back (below 1, the step is half as large, and so is the update)
        ([ULP, 0.4 * ULP], 0.4 / 1.16**0.5),  # of 1² + 0.4², the 0.4² is lost
        ([0.75 * ULP, 0.75 * ULP], 1 / 3),  # rounded away from 0
        ([0.0, 0.0], 0.0),
    ],
)
def test_what_rounding_changes_by_hand(update: list[float], error: float) -> None:
    weight = torch.ones(2, 1, dtype=torch.bfloat16)
    adapter = (torch.full((1, 1), 0.5), torch.tensor(update)[:, None], 2.0)
    assert folding_error(weight, adapter) == pytest.approx(error)


def test_float32_changes_nothing_and_bfloat16_the_more_the_smaller_the_update() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((200, 96), (4, 96), (200, 4)))
    assert folding_error(weight, (a, 1e-3 * b, 1.0)) < 1e-3
    errors = [folding_error(weight.bfloat16(), (a, size * b, 1.0)) for size in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.9 and errors[-1] < 0.05


@given(st.integers(1, 5 * FOLD_ROWS), st.sampled_from([1e-4, 1e-3, 1e-2]), st.integers(0, 99))
def test_some_rows_tell_what_all_would(rows: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((rows, 64), (2, 64), (rows, 2)))
    weight, adapter = weight.bfloat16(), (a, size * b, 2.0)
    update = 2.0 * size * b @ a
    rounded = with_adapter(weight, adapter).bfloat16().float() - weight.float()
    exact = ((rounded - update).norm() / update.norm()).item()
    assert folding_error(weight, adapter) == pytest.approx(exact, abs=1e-4 if rows <= FOLD_ROWS else 0.3)


@torch.no_grad()
def small_policy(base: SharedBase, size: float) -> None:
    """Give the policy an update of `size` times the usual distance between two numbers of its weights."""
    for layer in base.layers.adapted.values():
        a, b, scaling = layer.master(POLICY)  # type: ignore[misc]
        a.fill_(1.0)
        b.fill_(size * layer.frozen.weight().float().abs().mean().item() * 2**-8 / (scaling * len(a)))


@pytest.mark.parametrize(("size", "folded"), [(0.1, 0.0), (30.0, 1.0)])
@torch.no_grad()
def test_what_is_sampled_from_has_the_update_however_small(
    size: float, folded: float, make_base: MakeBase, make_config: Callable[..., RunConfig]
) -> None:
    base = make_base(make_config(dtype="bfloat16"))
    small_policy(base, size)
    layer = next(iter(base.layers.adapted.values()))
    a, b, scaling = layer.master(POLICY)  # type: ignore[misc]
    x = torch.ones(1, a.shape[1])  # along which the small numbers of the update add up
    update = scaling * x @ a.T @ b.T
    plain = x @ layer.frozen.weight().float().T
    with base.expanded(POLICY):
        sampled = layer(x.bfloat16()).float() - plain
    folding = base.layers.folding
    assert folding is not None and folding.layers == folded
    assert (folding.error <= FOLD_ERROR) == bool(folded)
    with base.layers.working_copy():  # into which nothing is folded
        assert base.layers.folding == folding
    with base.expanded(REFERENCE):  # which has no adapter
        assert base.layers.folding == folding
    kept = ((sampled * update).sum() / update.square().sum()).item()
    assert kept == pytest.approx(1.0, abs=0.25)
    assert not any(one.folded for one in base.layers.adapted.values())
