"""A model whose numbers would be wrong on the shared base is refused before any work; a right one passes, untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DistilBertConfig

from lora_rlhf.base import lean_layers, loading, role_layers, shared
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
from lora_rlhf.ppo.model_check import OwnReading, check_architecture, check_base, loaded_base
from lora_rlhf.ppo.readings import difference, own_logprobs, random_policy, shared_logprobs
from lora_rlhf.roofline.shapes_only import _causal_lm
from lora_rlhf.stages import Session

SMALL = LoraSettings(r=4)


def only_nn_dropout(model: Any) -> None:
    """What a base did that knows no other dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def rows_in_the_first_dimension(self: Any, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """What a base did that takes every first dimension for its rows."""
    for role, rows in self.spans:
        if (adapter := layer.adapter(role)) is not None:
            role_layers.add_low_rank(y[rows], x[rows], adapter)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "opt", "starcoder2", "gpt_neo"])
def test_a_right_architecture_passes(name: str) -> None:
    assert check_architecture(AutoConfig.for_model(name), SMALL)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("opt", {"dropout": 0.1}), ("starcoder2", {"residual_dropout": 0.1}), ("mixtral", {"router_jitter_noise": 0.1})],
)
def test_randomness_in_train_mode_is_found(monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any]) -> None:
    found = AutoConfig.for_model(name, **fields)
    assert check_architecture(found, SMALL)
    monkeypatch.setattr(shared, "turn_off_randomness", only_nn_dropout)
    with pytest.raises(UserError, match=r"log-probs in train mode off by [\d.]+ nats, where rounding explains 0.0001"):
        check_architecture(found, SMALL)


def test_tokens_in_one_dimension_that_are_taken_for_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared expert of Qwen2-MoE is given all tokens of all rows in one dimension."""
    monkeypatch.setattr(role_layers.MixedRoles, "add_adapters", rows_in_the_first_dimension)
    found = AutoConfig.for_model("qwen2_moe")
    with pytest.raises(UserError, match=r"several roles in one pass off by .* ppo.mixed_adapter_scoring: false"):
        check_architecture(found, SMALL)
    assert check_architecture(found, SMALL, mixed=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3_moe", r"experts, stacked in one tensor.* Set lora.target_modules: \[q_proj, k_proj, v_proj, o_proj\]"),
        ("deepseek_v3", r"experts, stacked in one tensor.* Set lora.target_modules: \[q_a_proj, q_b_proj"),
        ("bloom", r"none of down_proj.* set lora.target_modules: \[query_key_value, dense, dense_h_to_4h, dense_4h_to"),
        ("gpt2", "its layers hold their weights as Conv1D.*choose another model"),
        ("ernie4_5", "ppo.reward_sources: transformers has no classifier of the architecture ernie4_5"),
        ("llama4_text", "llama4_text cannot be shared by several roles .*choose another model"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_architecture(AutoConfig.for_model(name), SMALL)


def test_a_state_space_model_that_ignores_the_cache_is_refused() -> None:
    with pytest.raises(UserError, match=r"left-padded decoding with a cache off by"):
        check_architecture(AutoConfig.for_model("mamba2"), LoraSettings(r=4, target_modules=["in_proj"]))


def test_a_model_needs_no_classifier_where_the_reward_is_another_one() -> None:
    assert check_architecture(AutoConfig.for_model("ernie4_5"), SMALL, own_reward=False)


def test_nothing_is_known_of_an_architecture_whose_sizes_are_unknown() -> None:
    assert not check_architecture(AutoConfig.for_model("blt"), SMALL)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("falcon_h1", {}), ("lfm2", {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"] * 16})],
)
def test_a_cache_that_loses_its_rows_is_found(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with states of their own are left as they are by a cache's `batch_select_indices`."""
    found = AutoConfig.for_model(name, **fields)
    assert check_architecture(found, SMALL, own_reward=False)
    monkeypatch.setattr(Cache, "reorder_cache", Cache.batch_select_indices)
    with pytest.raises(UserError, match="cannot be run as PPO runs it"):
        check_architecture(found, SMALL, own_reward=False)


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


def test_the_checks_leave_the_random_state_of_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the cards are seeded"))
    assert check_architecture(AutoConfig.for_model("llama"), SMALL)


def norm_without_weight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(weight.dtype)


def norm_with_a_gradient_without_weight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The right number, with the gradient of a norm whose weight is 1."""
    plain = norm_without_weight(x, weight, eps)
    return plain + (plain.detach() * (weight - 1)).detach()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (norm_without_weight, "log-probs in eval mode off by"),
        (norm_with_a_gradient_without_weight, "gradients of the adapter off by"),
    ],
)
def test_a_norm_that_ignores_its_weight_is_found(monkeypatch: pytest.MonkeyPatch, wrong: Any, words: str) -> None:
    found = AutoConfig.for_model("llama")
    assert check_architecture(found, SMALL)
    monkeypatch.setattr(lean_layers, "rms_norm", wrong)
    with pytest.raises(UserError, match=words):
        check_architecture(found, SMALL)


def test_rotary_factors_of_a_part_of_each_head_are_cut_to_that_part() -> None:
    """As in Phi-4-mini: a quarter of each head is not rotated."""
    factors = {"type": "longrope", "short_factor": [1.0] * 36, "long_factor": [1.2] * 36}
    fields = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096, "rope_scaling": factors}
    assert check_architecture(AutoConfig.for_model("phi3", max_position_embeddings=131072, **fields), SMALL)


def test_a_list_of_kinds_says_how_many_layers_there_are() -> None:
    """As in Nemotron-H, whose config has no other number of layers."""
    kinds = ["linear_attention", "mlp", "linear_attention", "mlp", "full_attention", "mlp"] * 8
    twin = small_twin(AutoConfig.for_model("nemotron_h", layers_block_type=kinds), AutoModelForCausalLM)
    assert twin.config.layers_block_type == kinds[:5]


def test_other_errors_may_be_faults_of_this_package_and_those_of_a_card_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Callable[..., Any]:
        def read(*_: Any) -> Any:
            raise error

        return read

    found = AutoConfig.for_model("llama")
    monkeypatch.setattr(model_check, "shared_logprobs", raising(AttributeError("no such name")))
    with pytest.raises(
        UserError, match=r"AttributeError: no such name\): choose another model \(this may be a fault of"
    ):
        check_architecture(found, SMALL)
    monkeypatch.setattr(model_check, "shared_logprobs", raising(torch.AcceleratorError("CUDA error: an assert")))
    with pytest.raises(torch.AcceleratorError):
        check_architecture(found, SMALL)


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


def test_a_check_reads_each_role_once_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
        read.append(len(rows))
        return own_logprobs(model, rows)

    monkeypatch.setattr(model_check, "own_logprobs", counted)
    assert check_architecture(AutoConfig.for_model("llama"), SMALL)
    assert read == [3] * 6  # whether it runs; two roles; decoded; two roles decoded in one pass


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
