"""Cards of runs on a base that is published in 4 bits: what they say of it, and code that loads what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from card_check import card_faults
from hub_server import HubServer
from test_hub import Push
from test_model_card import KINDS, code_blocks, facts, own_score, score_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_rlhf.base.loading import resolved_model
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config_file import config_from_file
from lora_rlhf.hub.base_origin import base_origin
from lora_rlhf.hub.folder import hub_folder
from lora_rlhf.hub.model_card import Kind, model_card


@pytest.fixture
def run_on_4_bits(loud_run: Path, tmp_path: Path) -> Callable[[list[str] | None], Path]:
    """Return the run as if its base had been published in 4 bits, in `./my-base`, with these layers left whole.

    The layers hold the very weights that the run's own NF4 base has, so that its adapters fit.
    """

    def make(whole: list[str] | None) -> Path:
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16, llm_int8_skip_modules=whole,
        )  # fmt: skip
        stored = AutoModelForCausalLM.from_pretrained(
            resolved_model("tiny"), dtype=torch.float32, quantization_config=how, device_map={"": "cpu"}
        )
        stored.save_pretrained(tmp_path / "my-base")
        load_tokenizer(config_from_file(loud_run / "config.yaml")).save_pretrained(tmp_path / "my-base")
        held = yaml.safe_load((loud_run / "config.yaml").read_text())
        held["model_name_or_path"] = str(tmp_path / "my-base")
        (loud_run / "config.yaml").write_text(yaml.safe_dump(held))
        return loud_run

    return make


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["no list of whole layers", "a list without score"])
def test_the_blocks_load_the_trained_model(
    hub: HubServer,
    pushed: Push,
    run_on_4_bits: Callable[[list[str] | None], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: list[str] | None,
) -> None:
    from test_load_plus import logits

    # stock bitsandbytes may take a CPU kernel that rounds to bfloat16, which the package leaves out
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    run = run_on_4_bits(whole)
    pushed(run, "--reward_repo_id", "you/reward")
    monkeypatch.chdir(tmp_path)  # where the card says that the base has to be
    found: dict[str, list[dict[str, Any]]] = {"plus": [], "reward": []}
    for name, spaces in found.items():
        for block in code_blocks(hub.repositories[f"you/{name}"].head.files["README.md"].decode()):
            space: dict[str, Any] = {}
            exec(compile(block, name, "exec"), space)
            spaces.append(space)
    (plus, peft), (reward,) = found["plus"], found["reward"]
    for space in (plus, peft, reward):
        layers = [m for m in space["model"].modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {torch.float32}
    difference = logits(plus["model"], plus["tokenizer"]) - logits(peft["model"], peft["tokenizer"])
    assert difference.abs().max() < 1e-3
    assert score_of(reward) == pytest.approx(own_score(run, reward["ids"]), abs=1e-3)
    assert abs(score_of(reward)) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged_into_4_bits(run_on_4_bits: Callable[..., Path], kind: Kind) -> None:
    card = hub_folder(run_on_4_bits(None), kind, "you/plus", ask_hub=False).card
    assert card_faults(card) == []
    assert "merge_and_unload" not in card and "BitsAndBytesConfig" not in card
    assert "it is a plain model" not in card
    assert ("The base is published in 4 bits alone" in card) == (kind == "adapter")
    assert "| precision | NF4 base as it is published, computed in float32" in card


def test_fp4_is_not_called_nf4() -> None:
    origin = replace(facts().origin, kind="hub", name="some/fp4", hub_name="some/fp4", published_type="fp4")
    card = model_card(replace(facts(), origin=origin))
    assert "| precision | FP4 base as it is published, computed in bfloat16" in card
    assert "NF4" not in card and "nf4" not in card


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "fp4"),
        ({"quantization_config": {"load_in_4bit": True}}, "fp4"),  # what bitsandbytes takes where none is named
        ({"quantization_config": {"load_in_8bit": True}}, None),
        ({"quantization_config": None}, None),
        ({"model_type": "mistral"}, None),
        ([], None),
    ],
)
def test_how_a_base_is_stored_is_what_its_config_says(hub: HubServer, tmp_path: Path, held: Any, found: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(held))
    assert base_origin(str(tmp_path), None, ask_hub=False).published_type == found
    snapshot = tmp_path / "models--some--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(tmp_path / "config.json", snapshot)
    assert base_origin(str(snapshot), None, ask_hub=False).published_type == found
    hub.create("some/base", {"config.json": json.dumps(held).encode()})
    assert base_origin("some/base", None, ask_hub=False).published_type is None
    assert base_origin("some/base", None, ask_hub=True).published_type == found
    assert base_origin("some/base", None, ask_hub=False).published_type == found  # from the cache
