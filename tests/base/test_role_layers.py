"""Role layers: PEFT's numbers without PEFT's detours, and working copies that come and go."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lora_rlhf.base.role_layers import FrozenLinear, MixedRoles, RoleLayers, dequantized_weight
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.config import RunConfig

MakeBase = Callable[..., SharedBase]


@pytest.fixture
def rows(make_base: MakeBase) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    return ids, mask


def stock(base: SharedBase) -> SharedBase:
    """Take our forwards off again."""
    for module in base.model.modules():
        module.__dict__.pop("forward", None)
    return base


@pytest.mark.parametrize("role", [POLICY, REFERENCE, REWARD, VALUE])
@pytest.mark.parametrize("held", [True, False], ids=["working copy", "4-bit weights"])
def test_every_role_has_pefts_states_and_gradients(
    make_base: MakeBase, rows: tuple[torch.Tensor, torch.Tensor], role: str, held: bool
) -> None:
    ours, theirs = make_base(), stock(make_base())
    found = []
    for base in (ours, theirs):
        if role != REFERENCE:
            base.set_trainable(role, True)
        if held and base is ours:
            with base.layers.working_copy():
                states = base.hidden(role, *rows)
                if role != REFERENCE:
                    (states * torch.arange(64).cos()).sum().backward()
        else:
            states = base.hidden(role, *rows)
            if role != REFERENCE:
                (states * torch.arange(64).cos()).sum().backward()
        heads = 0 if role not in base.heads else 1
        own = [] if role == REFERENCE else base.parameters(role)[: -heads or None]
        found.append([states.detach(), *(p.grad for p in own)])
    assert len(found[0]) > (role != REFERENCE)
    for one, other in zip(*found, strict=True):
        largest = other.abs().max().item()  # gradients run into hundreds, and cancel in places
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("cast_once", [False, True], ids=["one after the other", "side by side"])
@pytest.mark.parametrize("held", [True, False], ids=["working copy", "4-bit weights"])
def test_each_row_has_the_states_of_its_own_role(
    make_base: MakeBase, rows: tuple[torch.Tensor, torch.Tensor], cast_once: bool, held: bool
) -> None:
    """With adapters of other ranks, scalings and layers, in any order of rows."""
    base = make_base()
    for name, rank, modules in (("small", 2, ["q_proj", "down_proj"]), ("wide", 6, ["v_proj"])):
        base.new_adapter(name, LoraConfig(r=rank, lora_alpha=9, target_modules=modules), trainable=False)
        with torch.no_grad():
            for i, parameter in enumerate(base.parameters(name)):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    roles = ["wide", REFERENCE, POLICY, "small", "wide", REWARD]
    ids, mask = (torch.cat([part, part.flip(0)]) for part in rows)
    everyone = base.layers.side_by_side(name for name in [VALUE, *roles]) if cast_once else None
    with base.layers.working_copy() if held else contextlib.nullcontext():
        with base.mixed(MixedRoles(roles, everyone)):
            together = base._forward(ids, mask)
        with torch.no_grad():
            for i, role in enumerate(roles):
                alone = base.hidden(role, ids[i : i + 1], mask[i : i + 1])[0]
                torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[3], atol=0.1)


def test_adapters_side_by_side_stay_as_they_were(make_base: MakeBase, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    base = make_base()
    kept = base.layers.side_by_side([POLICY])
    with torch.no_grad():
        before = base.hidden(POLICY, *rows)
        for parameter in base.parameters(POLICY):
            parameter.zero_()
        with base.mixed(MixedRoles([POLICY] * 3, kept)):
            torch.testing.assert_close(base._forward(*rows), before, rtol=1e-4, atol=1e-4)


def test_no_role_is_switched_while_several_are_played(make_base: MakeBase) -> None:
    base = make_base()
    with (
        base.mixed(MixedRoles([POLICY, REFERENCE])),
        pytest.raises(RuntimeError, match="several roles are played at once"),
        base.role(REWARD),
    ):
        pass
    with base.role(REWARD):
        assert base.model.active_adapter == REWARD


def test_a_working_copy_is_the_dequantised_weight_and_leaves_no_trace(make_base: MakeBase) -> None:
    base = make_base()
    frozen = [f for f in base.layers.frozen.values() if f.is_quantized]
    assert len(frozen) == 14 and base.layers.copy_bytes() == 4 * sum(f.weight().numel() for f in frozen)
    with pytest.raises(KeyError), base.layers.working_copy():
        for one in frozen:
            assert one.copy is not None
            torch.testing.assert_close(one.copy, dequantized_weight(one.layer), rtol=0, atol=0)
        raise KeyError
    assert all(one.copy is None for one in frozen)


def test_layers_without_an_adapter_are_copied_too(make_base: MakeBase, make_config: Callable[..., object]) -> None:
    config = make_config()
    config.lora.target_modules = ["q_proj"]  # type: ignore[attr-defined]
    base = make_base(config)
    assert len(base.layers.adapted) == 2 and len([f for f in base.layers.frozen.values() if f.is_quantized]) == 14
    with base.layers.working_copy(folded_role=POLICY):
        assert all(f.copy is not None for f in base.layers.frozen.values())


def test_a_folded_copy_holds_the_adapter_of_its_role(make_base: MakeBase) -> None:
    base = make_base()
    layer = next(m for m in base.model.modules() if isinstance(m, LoraLayer))
    expected = dequantized_weight(layer.get_base_layer()) + layer.get_delta_weight(REWARD)
    with torch.no_grad(), base.layers.working_copy(folded_role=REWARD):
        copied = base.layers.adapted[layer].frozen.copy
        torch.testing.assert_close(copied, expected)


def test_layers_that_are_adapted_later_are_taken_in(make_base: MakeBase, make_config: Callable[..., object]) -> None:
    config = make_config()
    config.lora.target_modules = ["q_proj"]  # type: ignore[attr-defined]
    base = make_base(config)
    before = len(base.layers.adapted)
    wider = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    base.new_adapter("other", wider, trainable=False)
    assert len(base.layers.adapted) == 2 * before
    assert all(isinstance(frozen, FrozenLinear) for frozen in base.layers.frozen.values())


def test_sixteen_bit_models_are_copied_only_where_a_role_is_folded_in(
    make_base: MakeBase, make_config: Callable[..., object]
) -> None:
    base = make_base(make_config(load_in_4bit=False))
    assert base.layers.copy_bytes() == 4 * sum(f.weight().numel() for f in base.layers.frozen.values())
    with base.layers.working_copy():
        assert all(frozen.copy is None for frozen in base.layers.frozen.values())
    with base.layers.working_copy(folded_role=POLICY):
        assert all(frozen.copy is not None for frozen in base.layers.frozen.values())


def test_room_is_asked_of_the_system(make_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = copy.copy(make_base().layers)
    free = 3 * layers.copy_bytes()
    monkeypatch.setattr("lora_rlhf.base.role_layers.free_bytes", lambda device: free)
    assert isinstance(layers, RoleLayers) and layers.has_room_for_copy()
    free = layers.copy_bytes()
    assert not layers.has_room_for_copy()


def test_a_packed_copy_gives_what_a_plain_one_gives(
    make_base: MakeBase, make_config: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(make_config(dtype="bfloat16"))
    if not base.layers._can_pack():
        pytest.skip("oneDNN has no bfloat16 here")
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        with base.expanded(POLICY), torch.no_grad():
            assert all((f.packed is None) == bool(found) for f in base.layers.frozen.values())
            found.append(base.hidden(POLICY, ids, torch.ones_like(ids, dtype=torch.bool)))
        monkeypatch.setattr(base.layers, "_can_pack", lambda: False)
    torch.testing.assert_close(found[0].float(), found[1].float(), rtol=0.02, atol=0.05)
    assert all(f.packed is None and f.copy is None for f in base.layers.frozen.values())


def test_a_copy_that_is_given_up_is_freed_at_once(make_base: MakeBase) -> None:
    layers = make_base().layers
    with layers.working_copy():
        first = next(f.copy for f in layers.frozen.values() if f.copy is not None)
        held = weakref.ref(first._base)  # the whole block
        del first
        assert held() is not None
        layers.give_up_copy()
        assert held() is None


def test_a_role_decodes_the_same_with_its_adapter_cast_once(
    make_base: MakeBase, make_config: Callable[..., RunConfig], rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base = make_base(make_config(dtype="bfloat16"))
    with torch.no_grad():
        before = base.hidden(POLICY, *rows)
        with base.layers.adapters_cast(POLICY):
            layer = next(iter(base.layers.adapted.values()))
            assert {factor.dtype for factor in layer.adapter(POLICY)[:2]} == {torch.bfloat16}
            assert layer.adapter(REWARD)[0].dtype == torch.float32
            assert torch.equal(base.hidden(POLICY, *rows), before)
            assert not torch.equal(base.hidden(REWARD, *rows), before)
        assert layer.adapter(POLICY)[0] is layer.layer.lora_A[POLICY].weight
        with base.layers.adapters_cast(REFERENCE, REWARD):
            assert torch.equal(base.hidden(POLICY, *rows), before)
    with base.layers.adapters_cast(POLICY):
        assert not base.hidden(POLICY, *rows).requires_grad, "the copies take no gradient"
    assert base.hidden(POLICY, *rows).requires_grad


def test_a_working_copy_is_folded_from_the_float32_adapter_whatever_is_cast(
    make_base: MakeBase, make_config: Callable[..., RunConfig]
) -> None:
    base = make_base(make_config(dtype="bfloat16"))
    layer = next(iter(base.layers.adapted.values()))
    with base.expanded(POLICY):
        expected = layer.frozen.weight() if layer.frozen.packed is None else layer.frozen.packed
        expected = expected.to_dense() if expected.is_mkldnn else expected.clone()
    with base.layers.adapters_cast(POLICY), base.expanded(POLICY):
        folded = layer.frozen.weight() if layer.frozen.packed is None else layer.frozen.packed
        assert torch.equal(folded.to_dense() if folded.is_mkldnn else folded, expected)
