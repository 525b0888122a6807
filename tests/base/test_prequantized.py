"""Checkpoints that bitsandbytes quantised before they were saved, as people share them, are loaded as they are."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import httpx
import huggingface_hub.errors as hub
import pytest
import torch
from recipe_runs import TINY, assert_one_line_of_error
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_rlhf import memory
from lora_rlhf.base.adapters import base_identity
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import explained, load_causal_lm, load_reward_model, model_config
from lora_rlhf.base.prequantized import UNGATED_COPIES, stored_precision
from lora_rlhf.base.role_layers import dequantized_weight
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.context import EvaluationSettings
from lora_rlhf.evaluation.evaluate import _judge
from lora_rlhf.evaluation.loaded_arms import named_arms
from lora_rlhf.run import STAGES, run_summary
from lora_rlhf.session import Session
from lora_rlhf.stages import base_stage

MakeConfig = Callable[..., RunConfig]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16, as real ones come."""
    folder = tmp_path_factory.mktemp("original")
    build_tiny_model(folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def checkpoint(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantise the tiny model with stock transformers and save it; keywords replace fields of BitsAndBytesConfig."""

    def make(dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        how = BitsAndBytesConfig(**(NF4 | {"bnb_4bit_compute_dtype": torch.float16} | fields))
        model = AutoModelForCausalLM.from_pretrained(
            original, dtype=dtype, quantization_config=how, device_map={"": "cpu"}
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(original).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def nf4(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


def quantised(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def rewritten(folder: Path, into: Path, **fields: Any) -> Path:
    """A copy whose config.json says something else of its quantisation."""
    shutil.copytree(folder, into)
    held = json.loads((into / "config.json").read_text())
    held["quantization_config"] |= fields
    (into / "config.json").write_text(json.dumps(held))
    return into


# What is loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loader", ["base", "reward model"])
def test_its_weights_are_those_of_the_file_and_compute_in_the_dtype_of_the_run(
    make_config: MakeConfig, original: Path, nf4: Path, loader: str, dtype: str
) -> None:
    """The file says float16; what is not quantised, heads above all, is in the dtype of the run too."""
    load = load_causal_lm if loader == "base" else lambda config: load_reward_model(config, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers warns where it ignores what it is given
        theirs = load(make_config(model_name_or_path=str(nf4), dtype=dtype))
    ours = load(make_config(model_name_or_path=str(original), dtype=dtype))
    wanted = getattr(torch, dtype)
    assert len(quantised(theirs)) == 14 and quantised(theirs).keys() == quantised(ours).keys()
    for name, layer in quantised(theirs).items():
        assert layer.compute_dtype == layer.weight.quant_state.dtype == wanted
        assert torch.equal(layer.weight, quantised(ours)[name].weight)
        weight, other = dequantized_weight(layer), dequantized_weight(quantised(ours)[name])
        assert weight.dtype == wanted and torch.equal(weight, other)
    assert {p.dtype for p in theirs.parameters()} == {torch.uint8, wanted}
    plain = [name for name, module in theirs.named_modules() if type(module) is torch.nn.Linear]
    assert plain == ["lm_head" if loader == "base" else "score"]


@pytest.mark.parametrize(
    ("fields", "kind", "nested", "words"),
    [
        ({}, "nf4", True, "NF4, double quantisation"),
        ({"bnb_4bit_use_double_quant": False}, "nf4", False, "NF4, single quantisation"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4", True, "FP4, double quantisation"),
    ],
    ids=["NF4", "NF4, quantised once", "FP4"],
)
def test_every_kind_of_four_bits_gives_the_products_of_its_dequantised_weights(
    make_config: MakeConfig,
    checkpoint: Callable[..., Path],
    fields: dict[str, Any],
    kind: str,
    nested: bool,
    words: str,
) -> None:
    model = load_causal_lm(make_config(model_name_or_path=str(checkpoint(**fields))))
    assert stored_precision(model) == words
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for layer in quantised(model).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested) == (kind, nested)
        if layer.in_features == 64:
            torch.testing.assert_close(layer(x), x @ dequantized_weight(layer).T, atol=1e-4, rtol=1e-4)


def test_the_base_stage_says_what_was_loaded(
    make_config: MakeConfig, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(model_name_or_path=str(checkpoint(bnb_4bit_quant_type="fp4")))
    base_stage(Session.open(config))
    assert "MistralForCausalLM, FP4, double quantisation: " in capsys.readouterr().out
    assert stored_precision(load_causal_lm(make_config(load_in_4bit=False, dtype="bfloat16"))) == "bfloat16"


def test_layers_that_a_checkpoint_left_whole_stay_whole_and_are_adapted(
    make_base: Callable[..., SharedBase], make_config: MakeConfig, checkpoint: Callable[..., Path]
) -> None:
    """Some are shared with their most sensitive layers in 16 bits; a list of their own would quantise the heads."""
    config = make_config(model_name_or_path=str(checkpoint(llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"])))
    assert type(load_reward_model(config, 2).score) is torch.nn.Linear
    base = make_base(config)
    whole = [n for n, m in base.causal_lm.named_modules() if type(m) is torch.nn.Linear and "lora" not in n]
    assert sorted(n.split(".")[-2] for n in whole if "layers.0.mlp" in n) == ["down_proj", "gate_proj", "up_proj"]
    ids, mask = torch.randint(5, 60, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    plain = base.hidden(POLICY, ids, mask)
    with base.layers.working_copy():
        torch.testing.assert_close(base.hidden(POLICY, ids, mask), plain, atol=1e-4, rtol=1e-4)
    plain.sum().backward()
    assert all(p.grad is not None for p in base.parameters(POLICY))


def test_a_checkpoint_of_the_same_weights_is_the_same_base(make_config: MakeConfig, original: Path, nf4: Path) -> None:
    models = [load_causal_lm(make_config(model_name_or_path=str(f), dtype="bfloat16")) for f in (original, nf4)]
    assert len({base_identity(model)["fingerprint"] for model in models}) == 1
    assert base_identity(models[1])["name"] == str(nf4)


def test_the_planner_reads_the_shape_of_the_whole_model(make_config: MakeConfig, original: Path, nf4: Path) -> None:
    shapes = [memory.model_shape(make_config(model_name_or_path=str(folder))) for folder in (original, nf4)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_a_whole_run_on_such_a_checkpoint(recipe: Callable[..., Any], nf4: Path, tmp_path: Path) -> None:
    options = [*TINY, "--model_name_or_path", str(nf4), "--output_dir", str(tmp_path / "run")]
    status, printed = recipe("direct_rlhf_lora.py", *options)
    assert status == 0, printed
    assert "not measured" in printed and "in quantised form alone" in " ".join(printed.split())
    summary = run_summary(tmp_path / "run")
    assert summary["seconds"].keys() == set(STAGES) and summary["arms"].keys() == {"base", "instruct", "plus"}
    assert summary["merge"]["drift"].keys() == {"dequantized"} and summary["merge"]["drift"]["dequantized"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert not quantised(merged) and merged.dtype == torch.float32  # the dtype of the run
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(step["first_ratio_deviation"] < 1e-4 for step in steps)


# What is refused


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, {}, "is quantised in 8 bits; .* name the model that it was"),
        ({"quant_method": "gptq", "bits": 4}, {}, "is quantised by gptq; only 16-bit weights and bitsandbytes'"),
        ({"quant_method": "awq"}, {}, "is quantised by awq; "),
        ({"quant_method": None, "load_in_4bit": True}, {"load_in_4bit": False}, "load_in_4bit: .* holds 4-bit weights"),
        ({}, {"load_in_4bit": False}, "load_in_4bit: .* holds 4-bit weights and no others; set load_in_4bit: true"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, {}, r"as bfloat16 \(bnb_4bit_quant_storage\)"),
        ({"llm_int8_skip_modules": ["(a+)+$"]}, {}, "llm_int8_skip_modules .* is no list of names"),
        ({"llm_int8_skip_modules": "lm_head"}, {}, "llm_int8_skip_modules .* is no list of names"),
    ],
    ids=["8 bits", "GPTQ", "AWQ", "an old file, wanted whole", "wanted whole", "for shards", "pattern", "text"],
)
def test_what_cannot_be_a_base_is_refused_in_words_before_any_work(
    make_config: MakeConfig, nf4: Path, tmp_path: Path, fields: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    run = make_config(model_name_or_path=str(rewritten(nf4, tmp_path / "copy", **fields)), **config)
    for load in (Session.open, load_causal_lm, lambda c: load_reward_model(c, 2), memory.model_shape):
        with pytest.raises(UserError, match=words) as error:
            load(run)
        assert str(tmp_path / "copy") in str(error.value)


def test_the_model_of_the_instruct_arm_is_looked_at_too(make_config: MakeConfig, nf4: Path, tmp_path: Path) -> None:
    other = rewritten(nf4, tmp_path / "copy", quant_method="awq")
    with pytest.raises(UserError, match="^instruct_model_name_or_path: .* is quantised by awq"):
        Session.open(make_config(instruct_model_name_or_path=str(other)))
    with pytest.raises(UserError, match="^instruct_model_name_or_path: .* 4-bit weights .*load_in_4bit is false: name"):
        Session.open(make_config(instruct_model_name_or_path=str(nf4), load_in_4bit=False))
    load_causal_lm(make_config(), str(nf4))


def test_the_models_of_an_evaluation_are_named_by_their_options(
    make_config: MakeConfig, nf4: Path, tmp_path: Path
) -> None:
    other, config = rewritten(nf4, tmp_path / "copy", quant_method="awq"), make_config()
    with pytest.raises(UserError, match="^--judge_model: .* is quantised by awq"):
        _judge(EvaluationSettings(tmp_path, judge_model=str(other)), config, tmp_path)
    with pytest.raises(UserError, match="^--judge_model: no folder /nowhere/at/all"):
        _judge(EvaluationSettings(tmp_path, judge_model="/nowhere/at/all"), config, tmp_path)
    base = config.model_name_or_path
    with pytest.raises(UserError, match="^--models: instruct: .* is quantised by awq"):
        named_arms(config, {"base": base, "instruct": str(other)})
    with pytest.raises(UserError, match="^instruct_model_name_or_path: .* is quantised by awq"):
        named_arms(replace(config, instruct_model_name_or_path=str(other)), {"base": base, "instruct": str(other)})
    with pytest.raises(UserError, match="^--models: base: .* is quantised by awq"):
        named_arms(config, {"base": str(other)})


@pytest.mark.parametrize("held", [[], "nf4", 4])
def test_a_config_that_holds_something_else_is_named(
    make_config: MakeConfig, nf4: Path, tmp_path: Path, held: Any
) -> None:
    folder = rewritten(nf4, tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": held}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=str(folder)):
        model_config(make_config(model_name_or_path=str(folder)))


@pytest.mark.parametrize("whole_model", [False, True], ids=["alone", "with a model"])
def test_an_adapter_is_no_base(
    make_config: MakeConfig, recipe: Callable[..., Any], original: Path, tmp_path: Path, whole_model: bool
) -> None:
    """Transformers would load the base that it names, add it, and call the sum the base."""
    folder = tmp_path / "adapter"
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    if whole_model:
        shutil.copytree(original, folder, dirs_exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(original)}))
    for load in (Session.open, load_causal_lm, memory.model_shape):
        with pytest.raises(UserError, match="is an adapter; name the model that it was trained on"):
            load(make_config(model_name_or_path=str(folder)))
    found = recipe("ppo_lora.py", *TINY, "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "run"))
    assert_one_line_of_error(*found, f"model_name_or_path: {folder} is an adapter")


# The Hub


def refusal(kind: Any, status: int) -> Exception:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid")))


@pytest.mark.parametrize(("gated", "copy"), UNGATED_COPIES.items())
def test_where_the_login_is_missing_a_copy_that_needs_none_is_named(
    make_config: MakeConfig, gated: str, copy: str
) -> None:
    config = replace(make_config(), model_name_or_path=gated)
    words = rf"`hf auth login`\. {copy} is a copy of it in 4 bits"
    with pytest.raises(UserError, match=words), explained(gated, config):
        raise refusal(hub.GatedRepoError, 403)


def test_a_repository_without_a_model_is_not_called_missing(make_config: MakeConfig) -> None:
    words = r"some/adapter on the Hub is no model that transformers loads \(an adapter\?"
    with pytest.raises(UserError, match=words), explained("some/adapter", make_config()):
        raise OSError("no config.json") from refusal(hub.RemoteEntryNotFoundError, 404)
