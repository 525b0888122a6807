"""A small twin has what its model has, and what heads and roles make of the unusual ones."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.shared import POLICY, VALUE, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import LoraSettings
from lora_rlhf.ppo.architecture_check import check_architecture

SMALL = LoraSettings(r=4)


def test_a_twin_has_the_kinds_of_layers_of_its_model_and_leaves_the_random_state() -> None:
    found = AutoConfig.for_model("gemma3_text")
    before = torch.random.get_rng_state()
    twins = [small_twin(found, AutoModelForCausalLM) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(twins[0].config.layer_types) == set(found.layer_types) and twins[0].num_parameters() < 10**6
    states = [twin.state_dict() for twin in twins]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_embeddings_narrower_than_the_layers_are_what_the_heads_read() -> None:
    """As OPT-350m's are: its reward and value heads read 512 numbers, and its layers have 1024."""
    found = AutoConfig.for_model("opt", hidden_size=1024, word_embed_proj_dim=512)
    twin = small_twin(found, AutoModelForCausalLM)
    assert twin.config.word_embed_proj_dim == twin.config.hidden_size // 2
    base = SharedBase(twin, lora_config(SMALL), torch.float32)
    assert base.hidden_size == twin.lm_head.in_features == twin.config.word_embed_proj_dim
    assert check_architecture(found, SMALL)


def test_a_layer_of_a_roles_name_is_no_parameter_of_that_role() -> None:
    twin = small_twin(AutoConfig.for_model("bert-generation", is_decoder=True), AutoModelForCausalLM)
    base = SharedBase(twin, lora_config(LoraSettings(r=4, target_modules=["query", "value"])), torch.float32)
    base.new_adapter(VALUE, base.configs[POLICY], trainable=True)
    both = [{id(parameter) for parameter in base.parameters(role)} for role in (POLICY, VALUE)]
    assert both[0] and both[1] and not both[0] & both[1]
