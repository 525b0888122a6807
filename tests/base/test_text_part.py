"""The text model inside a model that takes images too: which weights it gets, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_rlhf.base.loading import load_causal_lm, load_reward_model, model_config
from lora_rlhf.base.original_weights import OriginalWeights
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.model_shape import model_shape

MakeConfig = Callable[..., RunConfig]
TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
AS_PUBLISHED_FIRST = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def with_images(tmp_path: Path) -> Any:
    """A Gemma 3 that takes images, in a folder."""
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=7, boi_token_index=5,
        eoi_token_index=6,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    return model


def renamed(tmp_path: Path) -> None:
    """Give the tensors of a folder the names that Gemma 3 was first published with."""
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for new, old in AS_PUBLISHED_FIRST.items():
        tensors = {name.replace(new, old, 1) if name.startswith(new) else name: t for name, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("rename", [False, True], ids=["names of today", "names of first publication"])
def test_the_text_model_says_what_the_whole_one_says_of_text(
    make_config: MakeConfig, tmp_path: Path, rename: bool
) -> None:
    whole = with_images(tmp_path)
    if rename:
        renamed(tmp_path)
    config = make_config(model_name_or_path=str(tmp_path), load_in_4bit=False)
    text = load_causal_lm(config)
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert type(text).__name__ == "Gemma3ForCausalLM"
    name = "model.layers.1.mlp.up_proj.weight"
    weight = text.get_parameter(name)
    assert torch.equal(OriginalWeights(config, {name: weight.shape}, "model").read(name), weight)


@pytest.mark.parametrize("kind", ["Mistral3", "Llava"])
@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "head is the embeddings"])
@pytest.mark.parametrize("rename", [False, True], ids=["names of today", "names of first publication"])
def test_other_models_with_images_hold_their_text_model_in_the_same_places(
    make_config: MakeConfig, tmp_path: Path, kind: str, tied: bool, rename: bool
) -> None:
    """Mistral-Small-3.1 is a Mistral3. Whether the head is the embeddings, the outer config says."""
    text_config = transformers.MistralConfig(**TEXT)
    vision = transformers.PixtralVisionConfig(**VISION)
    config = getattr(transformers, f"{kind}Config")(text_config=text_config, vision_config=vision, image_token_index=7)
    config.tie_word_embeddings = tied
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    whole.save_pretrained(tmp_path)
    if rename:
        renamed(tmp_path)
    loaded = load_causal_lm(make_config(model_name_or_path=str(tmp_path), load_in_4bit=False))
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert type(loaded).__name__ == "MistralForCausalLM"
    same = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same == loaded.config.tie_word_embeddings == tied


def test_a_head_that_is_in_the_files_is_read_whatever_the_config_says(make_config: MakeConfig, tmp_path: Path) -> None:
    """Mistral-Small-3.1 was published before transformers had a word for it in the outer config."""
    text_config, vision = transformers.MistralConfig(**TEXT), transformers.PixtralVisionConfig(**VISION)
    whole = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text_config, vision_config=vision, tie_word_embeddings=False)
    )
    whole.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    del held["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(held))
    assert transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    loaded = load_causal_lm(make_config(model_name_or_path=str(tmp_path), load_in_4bit=False))
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    assert not loaded.config.tie_word_embeddings
    shape = model_shape(make_config(model_name_or_path=str(tmp_path)))
    assert shape.other >= 2 * 512 * 64  # embeddings and head
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "lm_head" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"lacks 1 tensors .* lm_head.weight"):
        load_causal_lm(make_config(model_name_or_path=str(tmp_path), load_in_4bit=False))


def test_a_reward_model_is_made_of_the_text_model(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = with_images(tmp_path)
    reward = load_reward_model(make_config(model_name_or_path=str(tmp_path), load_in_4bit=False), 2)
    assert reward.config.num_labels == 1 and reward.score.weight.shape == (1, 64)
    assert torch.equal(reward.model.embed_tokens.weight, whole.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: transformers.Qwen2_5_VLConfig(), "no causal language model for its text part alone"),
        (lambda: transformers.T5Config(), "has an encoder: choose a causal language model"),
        (
            lambda: transformers.DistilBertConfig(),
            r"\(distilbert\) is no causal language model that transformers knows",
        ),
    ],
    ids=["qwen2_5_vl", "t5", "distilbert"],
)
def test_other_models_are_refused_in_words(
    make_config: MakeConfig, tmp_path: Path, found: Callable[[], Any], words: str
) -> None:
    found().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model_name_or_path: .*{words}"):
        model_config(make_config(model_name_or_path=str(tmp_path)))


def test_weights_that_are_missing_are_not_invented(make_config: MakeConfig, tiny_folder: Path, tmp_path: Path) -> None:
    transformers.AutoConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    tensors = load_file(tiny_folder / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks 1 tensors of the model .* \(the first is {missing}\)"):
        load_causal_lm(make_config(model_name_or_path=str(tmp_path)))
