"""Games with the reward are named in words; an honest rise is not."""

from __future__ import annotations

import pytest

from lora_rlhf.warning_signs import hacking_signs


def history(**last: float) -> list[dict[str, float]]:
    plain = {"score": 0.0, "response_length": 40.0, "repetition": 0.1, "ended_rate": 0.9, "opening_share": 0.1}
    return [plain] * 5 + [plain | {"score": 1.0} | last] * 5


@pytest.mark.parametrize(
    ("last", "kind", "words"),
    [
        ({"response_length": 90}, "length", "from +0.00 to +1.00 while answers grew from 40 to 90 tokens"),
        ({"response_length": 12}, "shortness", "answers shrank from 40 to 12 tokens"),
        ({"repetition": 0.35}, "repetition", "repeated phrases rose from 10% to 35%"),
        ({"ended_rate": 0.6}, "ended", "answers that end fell from 90% to 60%"),
        ({"opening_share": 0.7}, "opening", "opening of three words rose from 10% to 70%"),
    ],
)
def test_signs_that_a_reward_is_gamed(last: dict[str, float], kind: str, words: str) -> None:
    found = hacking_signs(history(**last))
    assert list(found) == [kind] and words in found[kind]
    assert hacking_signs(history(**last, score=0.3)) == {}  # without a rise of the score it is no game
    assert hacking_signs(history(**last)[:9]) == {}


def test_a_run_that_an_earlier_version_began_says_nothing_of_openings() -> None:
    begun = [{name: value for name, value in step.items() if name != "opening_share"} for step in history()[:5]]
    assert hacking_signs(begun + history(opening_share=0.9)[5:]) == {}


def test_an_honest_rise_is_no_sign() -> None:
    assert hacking_signs(history(response_length=60, repetition=0.15, ended_rate=1.0)) == {}
