"""The stages as functions on one session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_rlhf import session as session_module
from lora_rlhf import stages
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.data import preferences
from lora_rlhf.errors import UserError
from lora_rlhf.session import Session
from lora_rlhf.stages import base_stage, ppo_stage, reward_stage
from lora_rlhf.tracking import PACKAGES


def test_each_split_of_a_data_set_is_read_once(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(max_train_pairs=8, max_eval_pairs=4)
    config.reward.max_steps = 1
    read: list[Any] = []
    whole = preferences.dataset_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(preferences, "dataset_rows", counted)
    session = Session.open(config)
    base_stage(session)
    reward_stage(session)
    assert len(read) == len({str(args) for args in read}) == 2  # train and test


def test_a_base_that_is_loaded_wrong_is_refused_before_the_reward_is_trained(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise UserError("its 4-bit products are wrong")

    done: list[Any] = []
    monkeypatch.setattr(session_module, "loaded_base", refuses)
    monkeypatch.setattr(stages, "train_reward_adapter", lambda *_: done.append("trained"))
    with pytest.raises(UserError, match="4-bit products"):
        reward_stage(Session.open(make_config()))
    assert not done


@pytest.mark.parametrize("stage", [base_stage, reward_stage, ppo_stage])
def test_an_architecture_that_would_compute_wrong_is_refused_before_anything_is_loaded(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, stage: Callable[[Session], None]
) -> None:
    def refuses(config: RunConfig) -> None:
        raise UserError(f"the twin of {config.model_name_or_path} is off")

    session = Session.open(make_config())
    (session.run / "reward_adapter").mkdir()
    (session.run / "reward_adapter" / "adapter_model.safetensors").touch()
    monkeypatch.setattr(session_module, "check_architecture_of", refuses)
    monkeypatch.setattr(session_module, "loaded_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="the twin of .* is off"):
        stage(session)


def test_every_recipe_says_what_its_adapters_leave_out(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each stage can be run by a recipe of its own, and the first one that loads the base tells."""
    monkeypatch.setattr(stages, "train_reward_adapter", lambda *_: pytest.fail("trained"))
    config = make_config(max_train_pairs=8, max_eval_pairs=4, lora=LoraSettings(r=4, target_modules=["q_proj"]))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        reward_stage(Session.open(config))
    told = " ".join(capfd.readouterr().out.split())
    assert "MistralForCausalLM" in told and told.count("1 of 7 kinds of linear layers in a block get an adapter") == 1


def test_a_tokenizer_that_is_larger_than_its_model_is_refused(
    make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["a word of its own"])
    tokenizer.save_pretrained(model)
    for settings in ({"model_name_or_path": str(model)}, {"instruct_model_name_or_path": str(model)}):
        with pytest.raises(UserError, match="1 tokens that the model has no embedding for .the first is 'a word of"):
            Session.open(make_config(**settings))


def test_data_that_changed_since_the_run_began_are_refused(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The stages would be of different data, and nothing would say so."""
    rows = [{"prompt": f"what is {i}?", "chosen": f"it is {i} indeed", "rejected": "no"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make_config(dataset_name=[str(file)])
    base_stage(Session.open(config))
    assert Session.open(config).pairs("train") and Session.open(config).pairs("test")
    rows[7]["chosen"] = "another answer"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    session = Session.open(config)
    with pytest.raises(UserError, match="pairs are not those that the run in .* began with"):
        session.pairs("train"), session.pairs("test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"report_to": "wandb"}, "report_to: wandb is not installed"),
        ({"ppo": {"optim": "paged_adam_8bit"}}, "ppo.optim: paged_adam_8bit needs CUDA"),
        ({"ppo": {"reward_sources": [{"kind": "adapter", "path": "/nowhere/at/all"}]}}, "no folder /nowhere/at/all"),
        ({"instruct_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"instruct_model_name_or_path": "an adapter"}, "is an adapter; a whole model is wanted"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_any_work(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any],
    words: str,
) -> None:  # fmt: skip
    if change.get("instruct_model_name_or_path") == "an adapter":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").touch()
        change = {"instruct_model_name_or_path": str(tmp_path / "adapter")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(PACKAGES, "wandb", ("no_such_package",))
    with pytest.raises(UserError) as error:
        Session.open(make_config(**change))
    assert words in str(error.value)
