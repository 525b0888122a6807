"""`load_plus`: what comes back from the Hub, or from a folder, computes what was trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from recipe_runs import ROOT

from lora_rlhf import UserError, load_plus
from lora_rlhf.base.loading import load_causal_lm, resolved_model
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config_file import config_from_file
from lora_rlhf.data.chat import prompt_ids

Push = Callable[..., str]
QUESTION = [{"role": "user", "content": "How do I fly a kite?"}]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """The logits [tokens, vocabulary] of a question."""
    with torch.no_grad():
        return model(torch.tensor([prompt_ids(tokenizer, QUESTION)])).logits[0]


@pytest.fixture
def trained(finished_run: Path) -> torch.Tensor:
    """The logits of the policy adapter on its 4-bit base, put together with stock PEFT from the run's own folder."""
    from peft import PeftModel

    config = config_from_file(finished_run / "config.yaml")
    base = load_causal_lm(config)
    untrained = logits(base, load_tokenizer(config))
    model = PeftModel.from_pretrained(base, str(finished_run / "policy_adapter")).eval()
    found = logits(model, load_tokenizer(config))
    assert (found - untrained).abs().max() > 1e-4  # the adapter does something, so that its loss would show
    return found


def four_bit_layers(model: Any) -> int:
    import bitsandbytes

    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def test_an_adapter_comes_back_as_it_was_trained(
    hub: HubServer, pushed: Push, loud_run: Path, trained: torch.Tensor
) -> None:
    pushed(loud_run)
    model, tokenizer = load_plus("you/plus")
    assert not model.training
    assert torch.equal(logits(model, tokenizer), trained)
    assert four_bit_layers(model) == 14
    assert tokenizer.chat_template == (loud_run / "merged" / "chat_template.jinja").read_text()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_merged_model_comes_back_as_it_was_written(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    import transformers

    pushed(finished_run, "--merged")
    model, tokenizer = load_plus("you/plus")
    stock = transformers.AutoModelForCausalLM.from_pretrained(finished_run / "merged").eval()
    assert torch.equal(logits(model, tokenizer), logits(stock, tokenizer))
    assert four_bit_layers(model) == 0
    assert not model.training
    assert model.generation_config.max_new_tokens == 16
    assert four_bit_layers(load_plus("you/plus", load_in_4bit=True)[0]) == 14


@pytest.mark.parametrize("place", ["", "policy_adapter", "hub/adapter", "policy_snapshots/step_000002"])
def test_folders_load_as_the_repository_does(pushed: Push, loud_run: Path, trained: torch.Tensor, place: str) -> None:
    pushed(loud_run, "--dry_run")
    shutil.copy(loud_run / "policy_adapter" / "adapter_model.safetensors", loud_run / "policy_snapshots/step_000002")
    model, tokenizer = load_plus(loud_run / place)
    assert torch.equal(logits(model, tokenizer), trained)


def test_what_comes_back_generates_until_it_ends(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    model, tokenizer = load_plus("you/plus")
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 16  # as long as the run's answers
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 1.0, 0)


def test_the_precision_can_be_chosen(loud_run: Path, trained: torch.Tensor) -> None:
    model, tokenizer = load_plus(loud_run, load_in_4bit=False)
    assert four_bit_layers(model) == 0
    assert not torch.equal(logits(model, tokenizer), trained)


def test_a_revision_is_what_the_tag_says(hub: HubServer, pushed: Push, finished_run: Path, other_run: Path) -> None:
    pushed(finished_run)
    (tag,) = hub.repositories["you/plus"].tags
    pushed(other_run, "--force")
    old, new = logits(*load_plus("you/plus", revision=tag)), logits(*load_plus("you/plus"))
    assert torch.equal(old, logits(*load_plus(finished_run)))
    assert torch.equal(new, logits(*load_plus(other_run)))
    assert not torch.equal(old, new)
    with pytest.raises(UserError, match="you/plus has no revision run-none"):
        load_plus("you/plus", revision="run-none")


def test_an_adapter_whose_base_was_a_folder_is_given_it(
    hub: HubServer, pushed: Push, loud_run: Path, trained: torch.Tensor, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(resolved_model("tiny"), tmp_path / "my-base"))
    config = (loud_run / "config.yaml").read_text()
    (loud_run / "config.yaml").write_text(config.replace("model_name_or_path: tiny", f"model_name_or_path: {base}"))
    pushed(loud_run)
    with pytest.raises(UserError, match=r"was a local folder, \./my-base, which is not here: .*base="):
        load_plus("you/plus")
    assert torch.equal(logits(*load_plus("you/plus", base=str(base))), trained)


def test_an_adapter_on_another_base_is_refused(pushed: Push, finished_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(resolved_model("tiny"), tmp_path / "other-base"))
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    pushed(finished_run, "--dry_run")
    with pytest.raises(UserError, match="trained on another base"):
        load_plus(finished_run / "hub" / "adapter", base=str(base))


def test_a_reward_adapter_is_no_chat_model(finished_run: Path) -> None:
    with pytest.raises(UserError, match="is a reward adapter"):
        load_plus(finished_run / "reward_adapter")


def test_pickled_weights_are_not_read(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    files = dict(hub.repositories["you/plus"].head.files)
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    hub.commit("you/plus", "pickled", files)
    with pytest.raises(UserError, match=r"it has no adapter_model\.safetensors"):
        load_plus("you/plus")
    assert not [request for request in hub.requests if request.endswith(".bin")]


def test_an_adapter_of_another_program_names_its_base(finished_run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(finished_run / "policy_adapter", tmp_path / "alone" / "adapter"))
    (alone / "base_model.json").unlink()
    (alone / "config.yaml").write_text("model: of that program\n")
    config = json.loads((alone / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolved_model("tiny")
    assert load_plus(alone)[1].chat_template
    (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name the base model"):
        load_plus(alone)
    (alone / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        load_plus(alone)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("you/none", "you/none is not on the Hub"),
        ("./away", "no folder ./away"),
        ("other/gated", "other/gated is gated"),
        ("you/empty", "holds no adapter"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_so(hub: HubServer, name: str, words: str) -> None:
    hub.create("other/gated", {"adapter_config.json": b"{}"}).gated = True
    hub.create("you/empty")
    with pytest.raises(UserError, match=words):
        load_plus(name)


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        load_plus(tmp_path)


def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, lora_rlhf; print('torch' in sys.modules, 'load_plus' in lora_rlhf.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    import lora_rlhf

    with pytest.raises(AttributeError, match="no attribute 'load_minus'"):
        lora_rlhf.load_minus  # noqa: B018
