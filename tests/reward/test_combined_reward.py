"""How reward sources add up: normalised on the reference's answers, weighed, and clipped in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reward_answers import answers, numbers

from lora_rlhf.errors import UserError
from lora_rlhf.reward.sources import CombinedReward, FunctionReward, ScoreScale


def test_each_source_is_normalised_before_the_weights_add_them_up() -> None:
    # a: 1, 2, 3 has mean 2 and deviation 1; b: 10, 30, 20 has mean 20 and deviation 10.
    reward = CombinedReward([numbers("a", [1, 2, 3], weight=2.0), numbers("b", [10, 30, 20], weight=-0.5)])
    reward.fit(answers("x", "y", "z"))
    assert reward.scales == {"a": ScoreScale(2.0, 1.0), "b": ScoreScale(20.0, 10.0)}
    total, raw = reward.scores(answers("x", "y", "z"))
    # 2·(−1, 0, 1) − 0.5·(−1, 1, 0)
    torch.testing.assert_close(total, torch.tensor([-1.5, -0.5, 2.0]))
    assert {name: scores.tolist() for name, scores in raw.items()} == {"a": [1, 2, 3], "b": [10, 30, 20]}


def test_scores_that_are_known_already_are_not_asked_for_again() -> None:
    def never(**_: Any) -> list[float]:
        raise AssertionError("asked again")

    reward = CombinedReward([FunctionReward(never, "a")], {"a": ScoreScale(1.0, 2.0)})
    total, raw = reward.scores(answers("x", "y"), known={"a": torch.tensor([3.0, 5.0])})
    assert total.tolist() == [1.0, 2.0] and raw["a"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    "scores",
    [
        [7.0] * 3, [0.0] * 3, [-1e30] * 3, [1e-30] * 3,
        [0.1] * 97,  # whose mean in float32 is not 0.1
        [1000.0, 1000.0001, 999.9999],  # neighbours in float32
        [3.5],
    ],
    ids=["same", "zero", "huge", "tiny", "0.1", "rounding noise", "one answer"],
)  # fmt: skip
def test_a_source_without_spread_adds_nothing_and_is_not_blown_up_later(scores: list[float]) -> None:
    reward = CombinedReward([numbers("success", scores)])
    batch = answers(*"x" * len(scores))
    assert reward.fit(batch) == ["success"]
    assert reward.scales["success"] == ScoreScale(pytest.approx(sum(scores) / len(scores), rel=1e-6), 1.0)
    assert reward.scores(batch)[0].tolist() == pytest.approx([0.0] * len(scores), abs=1e-3)
    first = reward.scores(answers("x"), known={"success": torch.tensor([reward.scales["success"].mean + 1])})
    assert first[0].tolist() == [1.0] or abs(scores[0]) > 1e7


@pytest.mark.parametrize(
    ("scores", "std"),
    [([0.0] * 3 + [1.0], 0.5), ([1e-30, 3e-30], 2**0.5 * 1e-30), ([1e4, 1e4 + 1], 0.5**0.5), ([3e38, -3e38], 4.24e38)],
    ids=["one success of four", "small scores", "a small part of large scores", "the largest that float32 has"],
)
def test_a_spread_is_kept_however_small_the_scores_are(scores: list[float], std: float) -> None:
    reward = CombinedReward([numbers("f", scores)])
    assert reward.fit(answers(*"x" * len(scores))) == []
    assert reward.scales["f"].std == pytest.approx(std, rel=1e-3)


def test_each_sources_normalised_score_is_clipped_and_the_others_still_count() -> None:
    sources = [numbers("a", [9.0, 9.0, -99.0, 1.0], weight=2.0), numbers("b", [1.0, 2.0, 0.5, 30.0], weight=-1.0)]
    reward = CombinedReward(sources, {"a": ScoreScale(1.0, 2.0), "b": ScoreScale(0.0, 1.0)})
    batch = answers(*"wxyz")
    # a: 4, 4, -50, 0; b: 1, 2, 0.5, 30; within 3: 3, 3, -3, 0 and 1, 2, 0.5, 3
    total, raw = reward.scores(batch, clip=3.0)
    assert total.tolist() == [5.0, 4.0, -6.5, -3.0]
    assert reward.scores(batch)[0].tolist() == [7.0, 6.0, -100.5, -30.0]
    assert reward.clipped_share(raw, 3.0) == 4 / 8 and reward.clipped_share(raw, 30.0) == 1 / 8
    assert raw["a"].tolist() == [9.0, 9.0, -99.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_on_the_references_answers_stops_the_run_and_names_the_source(bad: float) -> None:
    with pytest.raises(UserError, match="sometimes_nan"):
        CombinedReward([numbers("fine", [1, 2]), numbers("sometimes_nan", [1.0, bad])]).fit(answers("x", "y"))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_in_a_later_step_stops_the_run_too(bad: float) -> None:
    reward = CombinedReward([numbers("late", [1.0, bad])], {"late": ScoreScale(0.0, 1.0)})
    with pytest.raises(UserError, match="late"):
        reward.scores(answers("x", "y"))


def test_scales_over_several_batches_are_those_of_all_answers_together() -> None:
    given = iter([[1.0, 2.0], [3.0, 6.0]])
    reward = CombinedReward([FunctionReward(lambda **_: next(given), "f")])
    reward.fit(answers("x", "y"), answers("x", "y"))
    assert reward.scales["f"].mean == 3.0
    assert reward.scales["f"].std == pytest.approx((14 / 3) ** 0.5)  # squares of -2, -1, 0, 3 over n - 1
