"""An adapter is computed as PEFT computes it, or it is refused before any work, by the name of what is in the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig

from lora_rlhf.base.adapted_layers import check_target_modules
from lora_rlhf.base.adapters import CONFIG, HEAD_MODULES, MORE_THAN_LORA, WEIGHTS, read_plain_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.session import Session

MakeConfig = Callable[..., RunConfig]
MakeBase = Callable[..., SharedBase]
IDS = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 9, dtype=torch.bool)


@pytest.fixture
def written(make_config: MakeConfig, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """An adapter folder as stock PEFT writes it, with random weights, and the states that stock PEFT computes."""

    def write(**fields: Any) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(0)
        stock = load_causal_lm(make_config(load_in_4bit=False))
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        peft = get_peft_model(stock, LoraConfig(**(settings | fields)))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        peft.save_pretrained(str(tmp_path / "adapter"))
        fresh = load_causal_lm(make_config(load_in_4bit=False))
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            return tmp_path / "adapter", loaded.get_base_model().model(IDS).last_hidden_state

    return write


@pytest.fixture
def whole(make_base: MakeBase, make_config: MakeConfig) -> SharedBase:
    """A base that is not quantised."""
    return make_base(make_config(load_in_4bit=False), roles=())


# What is computed right

RIGHT: dict[str, dict[str, Any]] = {
    "r": {"r": 2}, "lora_alpha": {"lora_alpha": 5}, "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}}, "alpha_pattern": {"alpha_pattern": {"q_proj": 1}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": r".*layers\.0.*down_proj"},
    "target_modules": {"target_modules": r".*\.v_proj"}, "lora_dropout": {"lora_dropout": 0.5},
    "fan_in_fan_out": {"fan_in_fan_out": True}, "task_type": {"task_type": None},
    "init_lora_weights": {"init_lora_weights": "gaussian"}, "ensure_weight_tying": {"ensure_weight_tying": True},
    "revision": {"revision": "main"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", RIGHT.values(), ids=RIGHT)
def test_a_field_that_is_read_gives_the_states_of_stock_peft(
    written: Callable[..., tuple[Path, torch.Tensor]], whole: SharedBase, fields: dict[str, Any]
) -> None:
    folder, expected = written(**fields)
    whole.load_adapter("other", folder)
    with torch.no_grad():
        alone = whole.hidden("other", IDS, MASK)
        mixed = whole.hidden_mixed(["other", POLICY], IDS, MASK)[0]
        assert not torch.allclose(alone, whole.hidden(POLICY, IDS, MASK), atol=1e-2)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed, expected[0], atol=1e-5, rtol=1e-5)


# What is refused

OF_NO_ACCOUNT = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", "runtime_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
"""Fields that say where an adapter is from, or that only go with another field that is refused."""


def test_every_field_of_pefts_config_is_right_or_refused_or_of_no_account() -> None:
    known = RIGHT.keys() | set(MORE_THAN_LORA) | {"bias", "modules_to_save"} | OF_NO_ACCOUNT
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save: the adapter brings lm_head whole"),
    ({"modules_to_save": "embed_tokens"}, "modules_to_save: the adapter brings embed_tokens whole"),
    *[({"init_lora_weights": start}, f"init_lora_weights: {start}") for start in ("pissa_niter_4", "olora", "loftq")],
    *[({name: {"some": 1}}, f"this adapter has {name}") for name in MORE_THAN_LORA],
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_an_adapter_that_is_more_than_lora_is_refused_where_a_run_begins(
    make_base: MakeBase, make_config: MakeConfig, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "other"
    make_base(roles=()).save_adapter(POLICY, folder)
    assert set(json.loads((folder / CONFIG).read_text())) >= {"r", "target_modules"} and read_plain_config(folder)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))
    sources = [{"kind": "adapter", "path": str(folder)}]
    with pytest.raises(UserError, match=rf"ppo\.reward_sources\[0\]: path: {folder}: .*{words}"):
        Session.open(make_config(ppo={"reward_sources": sources}))


def test_the_head_of_a_reward_adapter_is_not_refused(make_base: MakeBase, tmp_path: Path) -> None:
    make_base().save_adapter("reward", tmp_path / "reward")
    assert set(read_plain_config(tmp_path / "reward")["modules_to_save"]) == HEAD_MODULES


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (
            ["q_proj", "lm_head"],
            r"not lm_head \(the LM head\)\. The linear layers of this model are q_proj, k_proj, v_proj",
        ),
        (["embed_tokens"], r"not embed_tokens \(Embedding\)"),
        (["c_attn"], r"lora.target_modules: .*c_attn.* set lora.target_modules: \[q_proj, k_proj"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused_before_the_reward_stage(
    make_config: MakeConfig, modules: list[str], words: str
) -> None:
    config = make_config(lora=LoraSettings(r=4, target_modules=modules))
    with pytest.raises(UserError, match=words):
        Session.open(config)
    with pytest.raises(UserError, match=words):
        SharedBase(load_causal_lm(config), LoraConfig(target_modules=modules), torch.float32)


def test_the_experts_of_a_mixture_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """Transformers holds them in parameters of one module, and PEFT would adapt those."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=1, moe_intermediate_size=8, num_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match=r"experts, stacked in one tensor.* Set lora.target_modules: \[q_proj, k_proj"):
        check_target_modules(make_config(model_name_or_path=str(tmp_path / "moe"), lora=LoraSettings(r=4)))


def test_the_conv1d_of_gpt_2_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    config = make_config(model_name_or_path=str(tmp_path / "gpt2"), lora=LoraSettings(r=4, target_modules=["c_attn"]))
    with pytest.raises(
        UserError, match=r"not c_attn \(Conv1D\)\. This model has no linear layers: choose another base"
    ):
        check_target_modules(config)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_folder_with_a_layer_that_is_not_computed_is_refused(
    written: Callable[..., tuple[Path, torch.Tensor]], whole: SharedBase, name: str
) -> None:
    folder, _ = written(target_modules=["q_proj", name])
    with pytest.raises(UserError, match=f"{folder}: only linear layers .* not {name}"):
        whole.load_adapter("other", folder)


def test_weights_that_the_config_does_not_speak_of_are_refused(
    written: Callable[..., tuple[Path, torch.Tensor]], whole: SharedBase
) -> None:
    folder, _ = written()
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.ones(64)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="does not fit this base"):
        whole.load_adapter("other", folder)
