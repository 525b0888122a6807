"""Role layers: PEFT's numbers without PEFT's detours, and working copies that come and go."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lora_rlhf.base.role_layers import FrozenLinear, RoleLayers, dequantized_weight
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase

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
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free}))
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
