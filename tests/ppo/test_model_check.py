"""A model whose numbers would be wrong on the shared base is refused before any work; a right one passes, untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DistilBertConfig

from lora_rlhf.base import loading
from lora_rlhf.base.adapted_layers import check_target_modules
from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import named_arms
from lora_rlhf.model_shape import model_shape
from lora_rlhf.ppo import model_check
from lora_rlhf.ppo.model_check import OwnReading, check_base, loaded_base
from lora_rlhf.ppo.readings import difference, random_policy, shared_logprobs
from lora_rlhf.roofline.shapes_only import _causal_lm
from lora_rlhf.session import Session

SMALL = LoraSettings(r=4)


@pytest.mark.parametrize(
    ("dtype", "in_4_bits"), [("float32", False), ("bfloat16", True), ("float16", True), ("bfloat16", False)]
)
def test_a_loaded_base_passes_and_is_what_it_is_without_the_check(
    make_config: Callable[..., RunConfig], dtype: str, in_4_bits: bool
) -> None:
    config = make_config(dtype=dtype, load_in_4bit=in_4_bits)
    torch.manual_seed(config.seed)
    plain = SharedBase(load_causal_lm(config), lora_config(config.lora), getattr(torch, dtype))
    drawn = torch.rand(1)
    base = loaded_base(config)
    assert torch.equal(torch.rand(1), drawn)
    expected = dict(plain.model.named_parameters())
    for name, parameter in base.model.named_parameters():
        other = expected.pop(name)
        assert torch.equal(parameter, other) and parameter.requires_grad == other.requires_grad, name
        assert parameter.grad is None and parameter.dtype == other.dtype
    assert not expected
    assert not any(module.training or module._forward_hooks for module in base.model.modules())
    assert base._active == POLICY and base.configs.keys() == {POLICY}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_base_has_room_and_a_wrong_one_none(make_config: Callable[..., RunConfig], dtype: str) -> None:
    """Right: half of the limit. Wrong, by dropout of 0.1 in the states alone or a scale of 0.9: above it."""
    config = make_config(dtype=dtype)

    def shared_and_own() -> tuple[SharedBase, OwnReading]:
        causal_lm = load_causal_lm(config)
        own = OwnReading.of(causal_lm, getattr(torch, dtype))
        return SharedBase(causal_lm, lora_config(config.lora), getattr(torch, dtype)), own

    base, own = shared_and_own()
    check_base(base, OwnReading(own.rows, own.logprobs, own.noise / 2), mixed=True)

    def dropped(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, 0.1, training=base.model.training)

    hooks = [layer.mlp.register_forward_hook(dropped) for layer in base.trunk.layers]
    with pytest.raises(UserError, match="log-probs in train mode"):
        check_base(base, own, mixed=True)
    for hook in hooks:
        hook.remove()
    check_base(base, own, mixed=True)
    base.lm_head.weight.data *= 0.8
    with pytest.raises(UserError, match="log-probs in eval mode"):
        check_base(base, own, mixed=True)


def test_two_thirds_of_the_tokens_decide_and_rounding_may_send_the_others_to_other_experts() -> None:
    one = difference("it", [torch.tensor([1.0, -3.0]), torch.tensor([9.0])], [torch.zeros(2), torch.zeros(1)])
    assert (one.largest, one.typical) == (9.0, 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right_mixtures_of_experts_are_not_refused_by_chance(dtype: torch.dtype) -> None:
    settings = LoraSettings(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    for seed in range(40):
        model = small_twin(AutoConfig.for_model("qwen3_moe"), AutoModelForCausalLM, seed).to(dtype)
        own = OwnReading.of(model, dtype)
        check_base(SharedBase(model, lora_config(settings), dtype), own, mixed=True)


def layer_left_out(base: SharedBase) -> None:
    base.trunk.layers[15].forward = lambda states, *_, **__: states


def layer_without_mlp(base: SharedBase) -> None:
    base.trunk.layers[25].mlp.forward = torch.zeros_like


def larger_logits(base: SharedBase) -> None:
    base.lm_head.weight.data = 1.05 * base.lm_head.weight.data


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [layer_left_out, layer_without_mlp, larger_logits])
def test_what_is_wrong_with_the_embedded_model_in_4_bits_is_found(
    make_config: Callable[..., RunConfig], wrong: Callable[[SharedBase], None]
) -> None:
    config = make_config(model_name_or_path="embedded", dtype="bfloat16")
    causal_lm = load_causal_lm(config)
    own = OwnReading.of(causal_lm, torch.bfloat16)
    base = SharedBase(causal_lm, lora_config(config.lora), torch.bfloat16)
    check_base(base, own, mixed=True)
    wrong(base)
    with pytest.raises(UserError, match="log-probs in eval mode off by"):
        check_base(base, own, mixed=True)


def test_a_number_that_is_none_is_infinitely_far_off() -> None:
    assert difference("it", [torch.tensor([1.0, torch.nan])], [torch.ones(2)]).typical == float("inf")


def test_a_base_of_unsloth_is_not_read(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    causal_lm = load_causal_lm(make_config())
    causal_lm.for_inference = lambda: None
    monkeypatch.setattr(model_check, "load_causal_lm", lambda *_: causal_lm)
    monkeypatch.setattr(model_check, "check_base", lambda *_: pytest.fail("read"))
    assert loaded_base(make_config()).causal_lm is causal_lm


def float16_twin(name: str = "llama") -> Any:
    return small_twin(AutoConfig.for_model(name), AutoModelForCausalLM).to(torch.float16)


@pytest.mark.parametrize(
    ("weight", "value"), [("model.norm.weight", torch.nan), ("model.layers.0.mlp.down_proj.weight", 6e4)]
)
def test_a_model_whose_own_logits_are_not_finite_is_refused(weight: str, value: float) -> None:
    model = float16_twin()
    assert OwnReading.of(model, torch.float16).noise < 0.1
    model.get_parameter(weight).data.view(-1)[::3] = value
    with pytest.raises(UserError, match=r"dtype: .*logits that are not finite in float16: set dtype: float32"):
        OwnReading.of(model, torch.float16)


def test_code_that_a_config_names_is_not_run_where_a_model_is_made_of_the_config_alone(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would ask whether to run it, having no class of its own; here the answer would be yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    found = DistilBertConfig(auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    found.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text(f"open({str(tmp_path / 'has_run')!r}, 'w')\nclass Own: pass\n")
    found._name_or_path = str(tmp_path / "model")
    config = make_config(model_name_or_path=found._name_or_path)
    monkeypatch.setattr(loading, "text_config", lambda found, *_: found)  # so that nothing is refused before
    for make in (
        lambda: check_target_modules(config),
        lambda: model_shape(config),
        lambda: small_twin(found, AutoModelForCausalLM),
        lambda: _causal_lm(config),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True|Unrecognized configuration class"):
            make()
        assert not (tmp_path / "has_run").exists()


def test_a_refused_base_is_named_by_its_setting_and_with_advice_that_changes_something(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedBase, "hidden_mixed", lambda self, _, *rows: self.hidden(REFERENCE, *rows))
    mixed = r"several roles in one pass off by .* wrong numbers: "
    with pytest.raises(UserError, match=f"^model_name_or_path: .*{mixed}set ppo.mixed_adapter_scoring: false, or"):
        loaded_base(make_config(ppo={"mixed_adapter_scoring": True}))
    with pytest.raises(UserError, match=f"^--models: base: .*{mixed}choose another model$"):
        loaded_base(make_config(), setting="--models: base", mixed=True)
    with pytest.raises(UserError, match=f"^--models: base: .*{mixed}choose another model$"):
        named_arms(make_config(), {"base": "tiny"})


def test_a_refusal_names_what_was_compared(make_config: Callable[..., RunConfig]) -> None:
    """One token in the worst third is far off, and does not decide: nor is it what the sentence says."""
    base = loaded_base(make_config())
    own = OwnReading([[5, 6, 7, 8]], shared_logprobs(base, REFERENCE, [[5, 6, 7, 8]]), 0.0)
    own.logprobs[0][0] += 100.0
    check_base(base, own, mixed=False)
    own.logprobs[0][1:] += 0.5
    with pytest.raises(UserError, match=r"eval mode off by 0\.5 nats, where rounding explains 0\.0001"):
        check_base(base, own, mixed=False)


def test_a_run_checks_the_first_load_of_its_base_alone(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(model_check, "check_base", lambda base, *_: checked.append(base))
    session = Session.open(make_config())
    first = session.shared_base()
    session.free_base()
    assert session.shared_base() is not first and checked == [first]


def test_a_random_policy_that_overflows_is_halved() -> None:
    """What enters the last projection is near the end of float16, and leaves it small."""
    model = float16_twin()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 10_000
        layer.mlp.down_proj.weight.data /= 10_000
    own = OwnReading.of(model, torch.float16)
    base = SharedBase(model, lora_config(SMALL), torch.float16)
    with random_policy(base), torch.no_grad():
        assert not torch.cat(shared_logprobs(base, POLICY, own.rows)).isfinite().all()
    check_base(base, own, mixed=True)
