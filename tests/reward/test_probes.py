"""The probes of a reward: one that reads the prompt passes, one that likes a manner does not."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.data.safety_prompts import safety_prompts
from lora_rlhf.reward.probes import passes, probed, probes_in_words, warning_in_words
from lora_rlhf.stages import _warn_of_failed_probes

PROMPTS = safety_prompts()
DECLINES = {text for prompt in PROMPTS for text in prompt.declines}
UNSAFE = {prompt.prompt for prompt in PROMPTS if prompt.label == "unsafe"}


def refuses_everything(pair: PreferencePair, answer: str) -> float:
    return float(answer in DECLINES)


def complies_with_everything(pair: PreferencePair, answer: str) -> float:
    return float(answer not in DECLINES)


def reads_the_prompt(pair: PreferencePair, answer: str) -> float:
    return float((answer in DECLINES) == (pair.prompt in UNSAFE))


def likes_length(pair: PreferencePair, answer: str) -> float:
    return float(len(answer))


def found_of(reward: object) -> dict[str, dict[str, float]]:
    def scores(pairs: Sequence[PreferencePair]) -> tuple[list[float], list[float]]:
        return [reward(p, p.chosen) for p in pairs], [reward(p, p.rejected) for p in pairs]  # type: ignore[operator]

    return probed(PROMPTS, scores)


@pytest.mark.parametrize(
    ("reward", "unsafe", "safe", "passing"),
    [
        (reads_the_prompt, 1.0, 1.0, True),
        (refuses_everything, 1.0, 0.0, False),
        (complies_with_everything, 0.0, 1.0, False),
    ],
)
def test_made_rewards_are_found_out(reward: object, unsafe: float, safe: float, passing: bool) -> None:
    found = found_of(reward)
    assert (found["unsafe"]["value"], found["safe"]["value"]) == (unsafe, safe)
    assert passes(found) == passing
    assert (warning_in_words(found) is None) == passing


def test_a_reward_that_likes_length_is_no_better_than_chance() -> None:
    found = found_of(likes_length)
    assert found["unsafe"]["value"] + found["safe"]["value"] == pytest.approx(1.0, abs=0.1)  # but for ties
    assert not passes(found)


def test_the_warning_names_what_ppo_may_learn_and_what_would_mend_it() -> None:
    said = warning_in_words(found_of(complies_with_everything))
    assert said is not None and "comply with harmful requests" in said and "refuse harmless" not in said
    assert "Pairs with refusals" in said
    assert "0% [0%, 3%] of unsafe prompts" in probes_in_words(found_of(complies_with_everything))


@pytest.mark.parametrize(("reward", "said"), [(reads_the_prompt, False), (complies_with_everything, True)])
def test_a_reward_that_fails_is_told_of_before_ppo(
    reward: object, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"reward_model": {"probes": found_of(reward)}}
    _warn_of_failed_probes(SimpleNamespace(run=SimpleNamespace(summary=summary)))  # type: ignore[arg-type]
    assert ("fails its safety probes" in " ".join(capsys.readouterr().out.split())) == said


def test_a_run_whose_reward_was_not_probed_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_of_failed_probes(SimpleNamespace(run=SimpleNamespace(summary={})))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
