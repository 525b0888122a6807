"""The planner: shapes and parts by hand, monotone predictions, advice that fits, and a refusal in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, MixtralConfig

from lora_rlhf import memory
from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError
from lora_rlhf.memory_advice import fitting_changes
from lora_rlhf.memory_plan import Planner, expands, peaks
from lora_rlhf.model_shape import ModelShape, shape_of

GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"


@pytest.fixture(scope="module")
def mistral() -> ModelShape:
    """Mistral-7B-v0.1; transformers' default config has its sizes."""
    return shape_of(MistralConfig(), AutoModelForCausalLM)


@pytest.fixture
def mistral_folder(tmp_path: Path) -> str:
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path / "mistral")
    return str(tmp_path / "mistral")


def test_the_shape_of_mistral_7b(mistral: ModelShape) -> None:
    assert mistral.body == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert mistral.body + mistral.other == 7_241_732_096
    assert (mistral.key_width, mistral.query_width, mistral.inner, mistral.layers) == (1024, 4096, 14336, 32)


def test_the_parts_of_a_step_by_hand(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    planner = Planner(config, mistral, on_cuda=True, expand=False)
    adapter = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert planner.adapter_parameters() == adapter == 41_943_040
    rollout, score, update = planner.ppo_stages()
    assert rollout.parts["adapters"] == 3 * 4 * adapter and rollout.parts["optimizer"] == 2 * 8 * adapter
    assert update.parts["gradients"] == 2 * 4 * adapter and "gradients" not in score.parts
    assert rollout.parts["keys and values"] == 64 * 512 * 32 * 2 * 1024 * 2  # 4 GiB: answers, tokens, layers, k and v
    # 4.13 bits a weight, and 16 for embeddings, head and norms
    assert rollout.parts["weights"] / GIB == pytest.approx((mistral.body * 0.51587 + 262_410_240 * 2) / GIB, rel=1e-4)


def test_merging_takes_one_shard_and_one_layer_of_main_memory(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    card, processor = (Planner(config, mistral, on_cuda, False) for on_cuda in (True, False))
    assert card.merge_bytes() == GIB + 4096 * 14336 * 2 < 1.2 * GIB
    assert processor.merge_bytes() == GIB + 4096 * 14336 * (2 + 4)  # the sum with the adapter is in float32
    merge = next(plan for plan in processor.stages() if plan.name == "merge")
    assert merge.parts["16-bit weights"] == processor.merge_bytes() and merge.total < 7 * GIB
    wide = replace(mistral, vocabulary=262_144)  # embeddings larger than a shard
    assert Planner(config, wide, True, False).merge_bytes() == (262_144 * 4096 + 4096 * 14336) * 2
    small = shape_of(MistralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2), AutoModelForCausalLM)
    assert Planner(config, small, True, False).merge_bytes() == (small.body + small.other + 64 * 128) * 2


def test_several_processes_copy_64_mib_of_gradients_to_sum_them(
    mistral: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 160 MiB (reward, SFT) and 320 MiB (PPO); of an adapter of 5 MiB all of it."""
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    small = replace(config, lora=replace(config.lora, layers_to_transform=[0]))
    alone = Planner(config, mistral, on_cuda=True, expand=False).stages()
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = Planner(config, mistral, on_cuda=True, expand=False).stages()
    more = {two.name: two.total - one.total for one, two in zip(alone, together, strict=True)}
    summing = ("reward", "instruct", "ppo: update")
    assert more == {plan.name: 64 * 2**20 if plan.name in summing else 0 for plan in alone}
    reward = Planner(small, mistral, on_cuda=True, expand=False).stages()[0]
    assert reward.parts["sum of gradients"] == reward.parts["gradients"] == 4 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_a_value_head_saves_an_adapter_and_its_optimizer(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    head = replace(config, ppo=replace(config.ppo, value_model="head"))
    both = [Planner(c, mistral, True, False).ppo_stages()[2].parts for c in (config, head)]
    assert both[0]["adapters"] / both[1]["adapters"] == 1.5 and both[0]["optimizer"] == 2 * both[1]["optimizer"]


@pytest.mark.parametrize(("value_model", "trained"), [("adapter", 2), ("head", 1)])
def test_what_max_kl_goes_back_to_takes_4_bytes_a_trained_parameter_of_main_memory(
    mistral: ModelShape, value_model: Literal["head"], trained: int
) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    config = replace(config, ppo=replace(config.ppo, value_model=value_model))
    never = replace(config, ppo=replace(config.ppo, max_kl=None))
    for on_cuda in (False, True):
        with_copy, without = (Planner(c, mistral, on_cuda, False) for c in (config, never))
        copy = 0 if on_cuda else 4 * trained * 41_943_040
        assert with_copy.standing_bytes() - without.standing_bytes() == copy
        more = {one.name: one.total - two.total for one, two in zip(with_copy.stages(), without.stages(), strict=True)}
        assert more == {name: copy if name.startswith("ppo") else 0 for name in more}


@pytest.mark.parametrize(("name", "gib"), [("mistral_7b_24gb.yaml", 24), ("mistral_7b_16gb.yaml", 16)])
def test_the_mistral_configs_fit_their_cards_with_a_fifth_to_spare(name: str, gib: int, mistral: ModelShape) -> None:
    usable, on_cuda = memory.usable_bytes(gib)
    assert on_cuda and usable < gib * GIB
    assert max(p.total for p in peaks(config_from_file(CONFIGS / name), mistral, True, usable)) < 0.8 * usable


def test_the_16_gb_config_differs_from_the_24_gb_one_in_memory_alone() -> None:
    small, large = (config_from_file(CONFIGS / f"mistral_7b_{g}gb.yaml") for g in (16, 24))
    memory_only = {"micro_batch_size": 4, "scoring_batch_size": 8, "rollout_batch_size": None}
    assert replace(small.ppo, **memory_only) == large.ppo
    for one, other in ((small.reward, large.reward), (small.sft, large.sft)):
        sizes = [s.per_device_train_batch_size * s.gradient_accumulation_steps for s in (one, other)]
        assert sizes[0] == sizes[1]


@given(st.sampled_from(["batch_size", "micro_batch_size", "scoring_batch_size", "response_length"]), st.booleans())
def test_more_of_anything_never_takes_less(name: str, on_cuda: bool) -> None:
    shape = shape_of(MistralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2), AutoModelForCausalLM)
    config = RunConfig(ppo=PpoSettings(batch_size=32))
    more = replace(config, ppo=replace(config.ppo, **{name: 2 * getattr(config.ppo, name)}))
    plans = [Planner(c, shape, on_cuda, False).stages() for c in (config, more)]
    assert all(one.total <= other.total for one, other in zip(*plans, strict=True))


@pytest.mark.parametrize("gib", [14.0, 12.0, 10.5])
def test_advice_fits_and_changes_memory_alone(mistral: ModelShape, gib: float) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    config = replace(config, ppo=replace(config.ppo, expand_weights=True, gradient_checkpointing=False))
    usable, _ = memory.usable_bytes(gib)
    assert max(p.total for p in peaks(config, mistral, True, usable)) > usable
    changes = fitting_changes(config, mistral, True, usable)
    assert changes and changes[0] == ("ppo.expand_weights", False)
    assert not {"max_length", "ppo.response_length", "ppo.batch_size"} & {name for name, _ in changes}
    for name, value in changes:
        section, _, leaf = name.rpartition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
    assert max(p.total for p in peaks(config, mistral, True, usable)) <= usable


def test_the_parts_that_a_config_brings_are_counted(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    names = [p.name for p in Planner(config, mistral, True, False).stages()]
    assert names == ["reward", "ppo: rollout", "ppo: score", "ppo: update", "compare"]  # two models when they compare
    own = replace(config, instruct_model_name_or_path=None, ppo=replace(config.ppo, reward_sources=[{"path": "x"}]))
    names = [p.name for p in Planner(own, mistral, False, False).stages()]
    assert names == ["instruct", "ppo: rollout", "ppo: score", "ppo: update", "merge"]  # merging is done by the CPU


def test_batches_of_trl_keep_their_product_and_lengths_only_shrink(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    odd = replace(config.reward, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    changes = dict(fitting_changes(replace(config, reward=odd), mistral, True, 11.2 * GIB) or [])
    products = [5 * 2, 4 * 8]
    for section, product in zip(("reward", "sft"), products, strict=True):
        size = changes.get(f"{section}.per_device_train_batch_size")
        assert size is None or size * changes[f"{section}.gradient_accumulation_steps"] == product
    assert changes.get("max_length", 0) < config.max_length


def test_nothing_fits_a_card_smaller_than_the_weights(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    assert fitting_changes(config, mistral, True, 3 * GIB) is None


def test_a_working_copy_is_predicted_where_a_run_would_make_one(mistral: ModelShape) -> None:
    auto = RunConfig()
    assert expands(auto, mistral, True, 80 * GIB) and not expands(auto, mistral, True, 24 * GIB)
    assert not expands(RunConfig(ppo=PpoSettings(expand_weights=False)), mistral, True, 80 * GIB)
    assert not expands(RunConfig(load_in_4bit=False), mistral, True, 24 * GIB)


def test_checkpointing_is_turned_on_where_memory_needs_it(mistral_folder: str) -> None:
    config = RunConfig(model_name_or_path=mistral_folder, ppo=PpoSettings(expand_weights=False))
    assert memory.with_checkpointing_decided(config, 80).ppo.gradient_checkpointing is False
    assert memory.with_checkpointing_decided(config, 16).ppo.gradient_checkpointing is True
    decided = replace(config, ppo=replace(config.ppo, gradient_checkpointing=False))
    assert memory.with_checkpointing_decided(decided, 16) == decided


@pytest.mark.parametrize(
    ("name", "gib", "checkpointing"),
    [
        ("mistral_7b_24gb.yaml", 24, False),
        ("mistral_7b_24gb.yaml", 12, True),
        ("mistral_7b_16gb.yaml", 16, False),
        ("mistral_7b_16gb.yaml", 10, True),
    ],
)
def test_the_mistral_configs_recompute_activations_only_on_cards_that_are_too_small(
    mistral_folder: str, name: str, gib: int, checkpointing: bool
) -> None:
    config = replace(config_from_file(CONFIGS / name), model_name_or_path=mistral_folder)
    assert config.ppo.gradient_checkpointing is None
    assert memory.with_checkpointing_decided(config, gib).ppo.gradient_checkpointing is checkpointing


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(ppo={"batch_size": 64, "response_length": 512}, max_prompt_length=512)
    memory.check_memory(config)
    needed = {p.name: p.total for p in peaks(config, memory.model_shape(config), False, math.inf)}
    free = 0.9 * max(needed.values()) - psutil.Process().memory_info().rss  # what this process has is counted in
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free}))
    with pytest.raises(UserError, match=r"memory: .* GiB at its peak.*This fits: --\w+"):
        memory.check_memory(config)


def test_a_card_with_too_little_main_memory_beside_it_is_refused(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    needed = memory.merge_bytes(config, on_cuda=True)
    monkeypatch.setattr(memory, "usable_bytes", lambda *_: (24.0 * GIB, True))
    for available, refused in ((1.01 * needed, False), (0.99 * needed, True)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=available: type("Memory", (), {"available": free}))
        if refused:
            with pytest.raises(UserError, match=r"memory: the merge stage takes .* GiB of main memory"):
                memory.check_memory(config)
        else:
            memory.check_memory(config)


def test_the_command_prints_a_table_and_says_whether_it_fits(
    mistral_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["memory", "--config", str(CONFIGS / "mistral_7b_24gb.yaml"), "--model_name_or_path", mistral_folder]
    monkeypatch.setattr("sys.argv", [*words, "--gpu-gib", "24"])
    memory.main()
    assert "keys and values" in (shown := capsys.readouterr().out) and "GiB to spare" in shown
    assert "the merge also takes 1.1 GiB of main memory" in shown
    monkeypatch.setattr("sys.argv", [*words, "--gpu-gib", "12"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 1 and "This fits: --ppo.rollout_batch_size" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--gpu-gib", "-1"])
    with pytest.raises(UserError, match="above 0"):
        memory.main()


def test_adapters_are_held_in_16_bits_while_passes_repeat(mistral: ModelShape) -> None:
    config = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    adapter = 2 * 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)

    def copies(**ppo: Any) -> list[float]:
        given = replace(config, ppo=replace(config.ppo, **ppo))
        plans = Planner(given, mistral, on_cuda=True, expand=False).ppo_stages()
        return [plan.parts.get("adapters in 16 bits", 0) / adapter for plan in plans]

    assert copies(gradient_checkpointing=False) == [1, 3, 1], "policy; policy, reward and value; one at a time"
    assert copies(gradient_checkpointing=True) == [1, 3, 0]
    assert copies(gradient_checkpointing=False, value_model="head") == [1, 2, 1]
    whole = Planner(replace(config, dtype="float32"), mistral, on_cuda=True, expand=False).ppo_stages()
    assert not any("adapters in 16 bits" in plan.parts for plan in whole)


def test_layers_that_a_checkpoint_leaves_whole_take_16_bits() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
    config = MistralConfig(**shape, num_attention_heads=4)
    config.quantization_config = {"llm_int8_skip_modules": ["model.layers.0.mlp"], "bnb_4bit_use_double_quant": False}
    given = config_from_file(CONFIGS / "mistral_7b_24gb.yaml")
    found = shape_of(config, AutoModelForCausalLM)
    weights = Planner(given, found, on_cuda=True, expand=False).stages()[0].parts["weights"]
    mlp, attention = 3 * 64 * 128, 4 * 64 * 64
    assert weights == 2 * mlp + (0.5 + 1 / 16) * (mlp + 2 * attention) + 2 * found.other


def test_a_mixture_of_experts_is_told_how_little_of_it_is_in_4_bits() -> None:
    """Mixtral 8×7B: 46.7 billion weights, of which attention is 32 · 42 million; the rest takes 2 bytes each."""
    config = RunConfig(model_name_or_path="mixtral", dtype="bfloat16")
    shape = shape_of(MixtralConfig(num_key_value_heads=8), AutoModelForCausalLM)
    assert shape.body == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert memory.weights_left_whole(config, shape) == (
        f"only 3% of the weights are in 4 bits: what is no linear layer (stacked experts, embeddings) stays whole and "
        f"takes {2 * shape.other / 2**30:.2f} GiB"
    )
    assert 2 * shape.other / 2**30 > 80
    assert memory.weights_left_whole(replace(config, load_in_4bit=False), shape) is None


def test_a_model_without_linear_layers_has_a_plan() -> None:
    shape = shape_of(GPT2Config(), AutoModelForCausalLM)
    assert shape.linears == () and shape.inner == 4 * 768
