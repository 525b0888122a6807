"""Layers below the first adapted one are run once for all roles, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.config import LoraSettings, RunConfig

MakeBase = Callable[..., SharedBase]
ROLES = (POLICY, REFERENCE, REWARD, VALUE)
UPPER = LoraSettings(r=4, lora_alpha=8, layers_to_transform=[1])


@pytest.fixture
def upper(make_base: MakeBase, make_config: Callable[..., RunConfig]) -> SharedBase:
    """The two-layer base with adapters on its upper layer alone."""
    return make_base(make_config(lora=UPPER))


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 500, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :3] = mask[0, 7:] = mask[1, :5] = False
    return ids, mask


def calls(base: SharedBase, layer: int) -> list[int]:
    """Note how many rows each forward of a layer is given."""
    seen: list[int] = []
    base.trunk.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_roles_from_common_states_equal_roles_from_ids(upper: SharedBase, rows: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        whole = {role: upper.hidden(role, *rows) for role in ROLES}
        lower_calls, upper_calls = calls(upper, 0), calls(upper, 1)
        common = upper.common_states(*rows)
        for role in ROLES:
            assert torch.equal(upper.hidden(role, *rows, common), whole[role])
        assert (lower_calls, upper_calls) == ([3], [3] * 4)
        assert common is not None
        mixed = upper.hidden_mixed(
            [role for role in ROLES for _ in range(3)], rows[0].repeat(4, 1), rows[1].repeat(4, 1),
            common.repeat(4, 1, 1),
        )  # fmt: skip
    for role, states in zip(ROLES, mixed.chunk(4), strict=True):
        torch.testing.assert_close(states, whole[role], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same(upper: SharedBase, rows: tuple[torch.Tensor, ...], checkpointing: bool) -> None:
    if checkpointing:
        upper.enable_gradient_checkpointing()
    gradients = []
    weights = torch.randn(upper.hidden_size, generator=torch.Generator().manual_seed(2))
    for share in (False, True):
        with upper.training():
            common = upper.common_states(*rows) if share else None
            (upper.hidden(POLICY, *rows, common) @ weights).sum().backward()
        gradients.append([p.grad.clone() for p in upper.parameters(POLICY) if p.grad is not None])
        for parameter in upper.parameters(POLICY):
            parameter.grad = None
    assert gradients[0] and any(g.any() for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_trunk_is_whole_again_even_after_a_failure(upper: SharedBase, rows: tuple[torch.Tensor, ...]) -> None:
    layers, norm = upper.trunk.layers, upper.trunk.norm
    with pytest.raises(IndexError):
        upper.common_states(rows[0] + 10**6, rows[1])  # ids beyond the vocabulary
    assert upper.trunk.layers is layers and upper.trunk.norm is norm


def test_an_adapter_on_a_lower_layer_of_any_role_ends_the_sharing(
    upper: SharedBase, rows: tuple[torch.Tensor, ...]
) -> None:
    upper.new_adapter("other", lora_config(LoraSettings(r=4, lora_alpha=8)), trainable=False)
    assert upper.common_states(*rows) is None


def test_nothing_is_shared_where_every_layer_is_adapted_or_layers_differ_in_kind(
    make_base: MakeBase, make_config: Callable[..., RunConfig], rows: tuple[torch.Tensor, ...]
) -> None:
    assert make_base().common_states(*rows) is None
    base = make_base(make_config(lora=UPPER))
    base.trunk.config.layer_types = ["sliding_attention", "full_attention"]
    base.new_adapter("other", lora_config(UPPER), trainable=False)
    assert base.common_states(*rows) is None


def test_expanded_weights_hold_the_roles_adapter_where_it_sits_and_the_base_elsewhere(
    make_base: MakeBase, make_config: Callable[..., RunConfig], rows: tuple[torch.Tensor, ...]
) -> None:
    base = make_base(make_config(lora=UPPER), roles=())
    base.new_adapter(REWARD, lora_config(LoraSettings(r=4, lora_alpha=8)), trainable=False)  # on every layer
    with torch.no_grad():
        for role in (POLICY, REFERENCE, REWARD):
            plain = base.hidden(role, *rows)
            with base.expanded(role):
                torch.testing.assert_close(base.hidden(role, *rows), plain, rtol=1e-4, atol=1e-4)


def test_a_failed_mixed_pass_leaves_the_role_as_it_was(upper: SharedBase, rows: tuple[torch.Tensor, ...]) -> None:
    before = upper.hidden(POLICY, *rows).detach()
    with pytest.raises(IndexError):
        upper.hidden_mixed(ROLES[:3], rows[0] + 10**6, rows[1])
    assert torch.equal(upper.hidden(POLICY, *rows), before)
