"""A model folder whose files are damaged is refused in one line that names it, whatever transformers raises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rlhf.base.loading import explained, load_causal_lm
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def refused(read: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as error:
        read()
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


def config_of(model: Path) -> RunConfig:
    return RunConfig(model_name_or_path=str(model), dtype="float32", load_in_4bit=False)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": "wide"}, {"hidden_size": None}, {"hidden_size": -64}, {"hidden_size": 32}, {"vocab_size": 100},
        {"num_hidden_layers": "two"}, {"num_hidden_layers": None}, {"num_attention_heads": 0},
        {"hidden_act": "nothing"}, {"rope_parameters": 3}, {"model_type": None}, {"model_type": 7},
        {"model_type": "unheard-of"},
        {"rms_norm_eps": []}, {"num_key_value_heads": 3}, {"head_dim": "x"},
        {"quantization_config": {"quant_method": "unheard-of"}},
        {"quantization_config": 5}, {"attn_implementation": "someone/kernel"},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_config_with_a_wrong_field(model: Path, changed: dict[str, Any]) -> None:
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(held | changed))
    try:
        loaded = load_causal_lm(config_of(model))
    except UserError as error:
        assert str(model) in str(error)
        assert len(str(error).splitlines()) == 1
    else:  # then it is a model of the right shape all the same
        assert all(torch.isfinite(p).all() for p in loaded.parameters())
        assert loaded.get_input_embeddings().weight.shape == (held["vocab_size"], held["hidden_size"])


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"text"', "{", "", "[" * 100_000, "\ufeff{}", '{"a": "\\ud800"}']
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_model_that_holds_something_else(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content, encoding="utf-8")
    load = load_causal_lm if name == "config.json" else load_tokenizer
    if name == "tokenizer_config.json" and content in ("\ufeff{}", '{"a": "\\ud800"}'):
        return
    refused(lambda: load(config_of(model)), str(model))


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 5000, -1])
def test_torn_weights(model: Path, kept: int) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:kept])
    refused(lambda: load_causal_lm(config_of(model)), str(model))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ImportError("no kernel")]
)
def test_want_of_memory_or_a_package_is_no_damage(model: Path, error: Exception) -> None:
    with pytest.raises(type(error)), explained(str(model), config_of(model)):
        raise error
