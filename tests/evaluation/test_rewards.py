"""The referee: halves that share no prompt, a training of its own, and numbers in base's own units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.base.shared import SharedBase
from lora_rlhf.config import RewardSettings, RunConfig
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.context import Evaluation, EvaluationSettings
from lora_rlhf.evaluation.loaded_arms import named_arms
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.evaluation.rewards import find_referee, folds_by_prompt, own_reading, referee_config

PAIRS = [PreferencePair((("user", f"question {i}"),), f"good {i}", f"bad {i}") for i in range(36)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_equal_prompts_are_in_one_half_and_the_halves_are_even(numbers: list[int]) -> None:
    pairs = [PreferencePair((("user", str(n)),), str(i), "bad") for i, n in enumerate(numbers)]
    folds = folds_by_prompt(pairs)
    assert set(folds) == {pair.prompt for pair in pairs}
    counts = [list(folds.values()).count(fold) for fold in (0, 1)]
    assert counts[0] - counts[1] in (0, 1)


def test_a_small_half_is_passed_over_more_often_but_not_for_ever() -> None:
    config = RunConfig(reward=RewardSettings(num_train_epochs=1, per_device_train_batch_size=16))
    assert referee_config(config, pairs=480, fold=0).reward.num_train_epochs == 1  # 30 steps
    assert referee_config(config, pairs=160, fold=0).reward.num_train_epochs == 3
    assert referee_config(config, pairs=16, fold=0).reward.num_train_epochs == 6
    seeds = {config.seed, *(referee_config(config, 99, fold).seed for fold in (0, 1))}
    assert len(seeds) == 3


@pytest.fixture
def evaluation(
    make_config: Callable[..., RunConfig], make_base: Callable[..., SharedBase], tmp_path: Path
) -> Evaluation:
    config = make_config(reward=RewardSettings(per_device_train_batch_size=6))
    make_base(seed=1).save_adapter("policy", tmp_path / "plus")
    arms = named_arms(config, {"base": config.model_name_or_path, "plus": str(tmp_path / "plus")})
    folder = tmp_path / "evaluation"
    settings = EvaluationSettings(tmp_path)
    return Evaluation(settings, config, None, folder, arms, PAIRS[:7], ResultCache(folder / "cache"), None)


def test_the_referee_is_trained_on_what_it_does_not_judge_and_reads_in_bases_units(evaluation: Evaluation) -> None:
    referee = find_referee(evaluation, PAIRS)
    assert referee is not None and referee.accuracy["n"] == len(referee.right) == len(PAIRS)
    assert referee.accuracy["low"] <= referee.accuracy["value"] == fmean(referee.right) <= referee.accuracy["high"]
    given_ = evaluation.held_out_answers()
    of_base = referee.reading(given_["base"])
    for half in (of_base[0::2], of_base[1::2]):  # prompts take turns between the halves
        assert fmean(half) == pytest.approx(0, abs=1e-5)
        assert pstdev(half) == pytest.approx(1, abs=1e-4)
    assert referee.reading(given_["plus"]) != of_base
    trained = {f: f.stat().st_mtime_ns for f in (evaluation.folder / "referee").rglob("*.safetensors")}
    assert len(trained) == 2


def test_too_few_pairs_make_no_referee(evaluation: Evaluation) -> None:
    assert find_referee(evaluation, PAIRS[:30]) is None


def test_a_named_referee_reads_the_answers_too(
    evaluation: Evaluation, make_base: Callable[..., SharedBase], tmp_path: Path
) -> None:
    make_base(seed=3).save_adapter("reward", tmp_path / "other_reward")
    settings = EvaluationSettings(tmp_path, referee=str(tmp_path / "other_reward"))
    referee = find_referee(replace(evaluation, settings=settings), PAIRS)
    assert referee is not None and len(referee.right) == len(PAIRS)
    assert fmean(referee.reading(evaluation.held_out_answers()["base"])) == pytest.approx(0, abs=1e-5)


def test_a_referee_without_head_is_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    settings = EvaluationSettings(tmp_path, referee=str(tmp_path / "plus"))
    other = Evaluation(
        settings, evaluation.config, None, evaluation.folder, evaluation.arms, [], evaluation.cache, None
    )
    with pytest.raises(UserError, match=r"--referee: .*plus has no reward head"):
        find_referee(other, PAIRS)


def test_models_without_a_run_have_no_reward_of_their_own(evaluation: Evaluation) -> None:
    assert own_reading(evaluation) is None
