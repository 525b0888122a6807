"""An architecture whose numbers would be wrong on the shared base is refused by its config alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache

from lora_rlhf.base import lean_layers, role_layers, shared
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.base.trunk import trunk_name
from lora_rlhf.config import LoraSettings
from lora_rlhf.errors import UserError
from lora_rlhf.ppo import architecture_check
from lora_rlhf.ppo.architecture_check import check_architecture
from lora_rlhf.ppo.readings import own_logprobs

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


def test_layers_are_found_where_they_are_not_called_what_the_model_says() -> None:
    """Llama-4 says that its layers are called language_model, and calls them model."""
    found = AutoConfig.for_model("llama4_text")
    with torch.device("meta"):
        model = small_twin(found, AutoModelForCausalLM)
    assert not hasattr(model, model.base_model_prefix) and trunk_name(model) == "model"
    assert check_architecture(found, SMALL, own_reward=False)


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
    monkeypatch.setattr(architecture_check, "shared_logprobs", raising(AttributeError("no such name")))
    with pytest.raises(
        UserError, match=r"AttributeError: no such name\): choose another model \(this may be a fault of"
    ):
        check_architecture(found, SMALL)
    monkeypatch.setattr(architecture_check, "shared_logprobs", raising(torch.AcceleratorError("CUDA error: an assert")))
    with pytest.raises(torch.AcceleratorError):
        check_architecture(found, SMALL)


def test_a_check_reads_each_role_once_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
        read.append(len(rows))
        return own_logprobs(model, rows)

    monkeypatch.setattr(architecture_check, "own_logprobs", counted)
    assert check_architecture(AutoConfig.for_model("llama"), SMALL)
    assert read == [3] * 6  # whether it runs; two roles; decoded; two roles decoded in one pass
