"""Hours of a run on a card: steps by hand, and the command that says them."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import ROOT

from lora_rlhf import memory
from lora_rlhf.base.known_shapes import SHIPPED, SMOLLM2_135M
from lora_rlhf.config import CompareSettings, LoraSettings, PpoSettings, RewardSettings, RunConfig, SftSettings
from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError
from lora_rlhf.roofline.cards import CARDS
from lora_rlhf.roofline.hours import (
    LAUNCH_SECONDS,
    REALISTIC_SHARE,
    realistic_seconds,
    stage_times,
    times_as_json,
    training_pairs,
)
from lora_rlhf.roofline.phases import ppo_phases

CARD = CARDS["rtx4090"]


@pytest.fixture
def config(tiny_folder: Path) -> RunConfig:
    return RunConfig(
        model_name_or_path=str(tiny_folder), max_prompt_length=8, max_length=16, lora=LoraSettings(r=2),
        reward=RewardSettings(
            per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2, contrast_share=0.5
        ),
        sft=SftSettings(max_steps=7),
        ppo=PpoSettings(
            batch_size=4, micro_batch_size=4, response_length=8, total_steps=11, normalization_samples=9,
            gradient_checkpointing=False, expand_weights=False,
        ),
        compare=CompareSettings(num_prompts=10),
    )  # fmt: skip


def test_the_steps_of_every_stage_by_hand(config: RunConfig) -> None:
    times = {one.stage: one for one in stage_times(config, CARD, pairs=20)}
    steps = {"reward": 10, "instruct": 7, "ppo: scale of the score": 3, "ppo": 11, "compare": 9}
    assert {stage: one.steps for stage, one in times.items()} == steps
    step = sum(phase.seconds(CARD) for phase in ppo_phases(config, CARD))
    assert times["ppo"].seconds == pytest.approx(11 * step)
    assert times["compare"].seconds < times["ppo"].seconds
    whole = times_as_json(list(times.values()))
    assert whole["seconds"] == pytest.approx(sum(one.seconds for one in times.values()))


def test_a_realistic_step_is_a_share_of_the_best_or_what_launching_takes(config: RunConfig) -> None:
    tiny = ppo_phases(config, CARD)[0]
    launching = sum(one.kernels for one in tiny.operations) * LAUNCH_SECONDS
    assert realistic_seconds(tiny, CARD) == pytest.approx(launching), "a tiny model leaves the card waiting"
    large = replace(tiny, operations=[replace(one, bytes=1e9) for one in tiny.operations])
    assert realistic_seconds(large, CARD) == pytest.approx(large.seconds(CARD) / REALISTIC_SHARE)


def test_stages_that_a_run_does_not_have_take_no_time(config: RunConfig) -> None:
    config = replace(
        config, instruct_model_name_or_path="some/model",
        ppo=replace(config.ppo, reward_sources=[{"kind": "function", "path": "m:f"}]),
    )  # fmt: skip
    assert [one.stage for one in stage_times(config, CARD)] == ["ppo: scale of the score", "ppo", "compare"]


@pytest.mark.parametrize(
    ("names", "weights", "most", "pairs"),
    [
        (["embedded"], [], None, 3541),
        (["embedded"], [], 100, 100),
        (["Anthropic/hh-rlhf:helpful-base", "Anthropic/hh-rlhf:harmless-base"], [], None, 43_835 + 42_537),
        (["Anthropic/hh-rlhf:helpful-base", "Anthropic/hh-rlhf:harmless-base"], [1, 1], None, 2 * 42_537),
        (["a/folder"], [], 50, 50),
        (["a/folder"], [], None, None),
    ],
)
def test_pairs_are_those_of_known_data_or_the_most_that_are_used(
    names: list[str], weights: list[float], most: int | None, pairs: int | None
) -> None:
    assert training_pairs(RunConfig(dataset_name=names, dataset_weights=weights, max_train_pairs=most)) == pairs


def test_the_embedded_pairs_are_as_many_as_the_file_has() -> None:
    file = ROOT / "lora_rlhf" / "data" / "embedded" / "train.jsonl"
    assert training_pairs(RunConfig()) == len(file.read_text(encoding="utf-8").splitlines())


def test_unknown_data_needs_a_number_of_pairs(config: RunConfig) -> None:
    with pytest.raises(UserError, match="--pairs N is needed: a/folder"):
        stage_times(replace(config, dataset_name=["a/folder"]), CARD)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["memory", *words])
    status = 0
    try:
        memory.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().out


def test_the_command_says_hours_and_cards_without_a_network(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(SHIPPED, "HuggingFaceTB/SmolLM2-135M", SMOLLM2_135M | {"num_hidden_layers": 2})  # to be quick
    words = ["--config", "recipes/configs/smollm2_135m.yaml", "--ppo.total_steps", "7"]
    status, printed = said(monkeypatch, capsys, *words, "--card", "rtx4090", "--json")
    assert status == 0 and "hours on RTX 4090" in printed and "an assumption until a card has been measured" in printed
    figures = json.loads(printed.splitlines()[-1])
    assert figures["fits"] and "h100" in figures["cards_that_fit"]
    assert figures["hours"]["stages"]["ppo"]["steps"] == 7
    assert figures["hours"]["seconds"] > 0


def test_a_run_fits_on_larger_cards_as_it_is_and_on_smaller_ones_with_checkpointing() -> None:
    config = config_from_file("recipes/configs/mistral_7b_24gb.yaml")
    large = replace(config, ppo=replace(config.ppo, gradient_checkpointing=False, micro_batch_size=16))
    assert memory.cards_that_fit(large) == ["a100", "h100"]
    undecided = replace(large, ppo=replace(large.ppo, gradient_checkpointing=None))
    assert "rtx4090" in memory.cards_that_fit(undecided)


def test_a_card_that_is_not_known_is_named_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--card gtx1080: known cards are rtx3090, rtx4090"):
        said(monkeypatch, capsys, "--config", "recipes/configs/tiny.yaml", "--card", "gtx1080")


def test_a_card_without_bfloat16_is_refused_until_the_run_computes_in_float16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_from_file("recipes/configs/tiny.yaml")
    assert "t4" not in memory.cards_that_fit(replace(config, dtype="bfloat16"))
    assert "t4" in memory.cards_that_fit(replace(config, dtype="float16"))
    assert memory.cards_that_fit(replace(config, dtype="float32")) == []
    words = ["--config", "recipes/configs/tiny.yaml", "--dtype", "bfloat16"]
    with pytest.raises(UserError, match="T4 has no bfloat16, and would emulate it: add --dtype float16"):
        said(monkeypatch, capsys, *words, "--card", "t4")
    with pytest.raises(UserError, match="counted for products in 16 bits: add --dtype bfloat16"):
        said(monkeypatch, capsys, *words[:2], "--dtype", "float32", "--card", "h100")
    with pytest.raises(UserError, match="--card brings its own memory"):
        said(monkeypatch, capsys, *words, "--card", "h100", "--gpu-gib", "12")
