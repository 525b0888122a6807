"""How often intervals hold the truth and verdicts are wrong, exactly or in simulation; and over-optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from lora_rlhf.evaluation.statistics import (
    Difference,
    non_inferiority,
    over_optimised,
    paired_difference,
    pooled_difference,
    win_rates,
)

Array = np.ndarray


def normal_difference(value: float, stderr: float, n: int = 100) -> Difference:
    return Difference(value, value - 2 * stderr, value + 2 * stderr, stderr, n)


def difference_of_outcomes(gained: int, lost: int, n: int) -> Difference:
    ours, base = np.zeros(n), np.zeros(n)
    ours[:gained] = 1
    base[gained : gained + lost] = 1
    return paired_difference(ours, base)


def holds(found: Difference, truth: float) -> bool:
    assert found.low is not None and found.high is not None
    return found.low <= truth <= found.high


def chance(event: Callable[[Difference], bool], n: int, gain: float, loss: float) -> float:
    """The exact probability of `event` for `n` pairs of outcomes, outcomes under 1e-6 left out."""
    gained, lost = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    counts = np.column_stack([gained, lost, n - gained - lost])[gained + lost <= n]
    chances = stats.multinomial.pmf(counts, n, [gain, loss, 1 - gain - loss])
    likely = chances > 1e-6
    rows = zip(counts[likely].tolist(), chances[likely].tolist(), strict=True)
    return sum(p for (more, less, _), p in rows if event(difference_of_outcomes(more, less, n)))


def logistic(logit: Array | float) -> Array | float:
    return 1 / (1 + np.exp(-logit))


# -- outcomes of 0 and 1, by enumeration ------------------------------------------------------------------------------

DISCORDANT = [(0.0, 0.0), (0.02, 0.02), (0.1, 0.1), (0.3, 0.3), (0.0, 0.1), (0.1, 0.0), (0.05, 0.15), (0.4, 0.1)]
"""Probabilities that a pair is gained and lost."""


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize(("gain", "loss"), DISCORDANT)
def test_the_interval_of_outcomes_holds_the_true_difference_in_95_percent(n: int, gain: float, loss: float) -> None:
    # 94 % at worst here; nearly always where few pairs differ, as counts are coarse
    coverage = chance(lambda found: holds(found, gain - loss), n, gain, loss)
    assert coverage >= 0.94
    if n == 200 and gain + loss >= 0.1:
        assert coverage <= 0.965


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.1), (0.01, 0.11), (0.05, 0.15), (0.2, 0.3)])
def test_an_arm_that_loses_the_margin_is_said_to_hold_in_2_5_percent(n: int, gain: float, loss: float) -> None:
    assert chance(lambda found: non_inferiority(found, loss - gain).verdict == "holds", n, gain, loss) <= 0.03


def test_an_arm_as_good_as_base_is_seldom_said_to_lose_and_at_the_needed_items_holds_in_half_the_cases() -> None:
    verdicts = [
        non_inferiority(difference_of_outcomes(*counts, 600), 0.05).verdict
        for counts in np.random.default_rng(0).multinomial(600, [0.2, 0.2, 0.6], size=500)[:, :2].tolist()
    ]
    assert "does not hold" not in verdicts
    # half the width is 1.96 sqrt(0.4 / 600) = 0.0506: the items are just those that are needed
    assert verdicts.count("holds") / 500 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("n", "tasks", "gain", "loss"), [(20, 3, 0.1, 0.1), (20, 7, 0.01, 0.1), (100, 7, 0.05, 0.15), (200, 3, 0.02, 0.02)]
)
def test_pooled_outcomes_hold_the_truth_and_keep_the_error_of_non_inferiority(
    n: int, tasks: int, gain: float, loss: float
) -> None:
    counts = np.random.default_rng(n + tasks).multinomial(n, [gain, loss, 1 - gain - loss], size=(700, tasks))
    known = {(more, less): difference_of_outcomes(more, less, n) for more, less, _ in counts.reshape(-1, 3).tolist()}
    pooled = [pooled_difference([known[more, less] for more, less, _ in row]) for row in counts.tolist()]
    assert np.mean([holds(found, gain - loss) for found in pooled]) >= 0.94
    if loss > gain:
        wrong = [non_inferiority(found, loss - gain).verdict == "holds" for found in pooled]
        assert np.mean(wrong) <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 700)


# -- real values, in simulation ---------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, n: int) -> Array:
    return rng.normal(size=n)


def exponential(rng: np.random.Generator, n: int) -> Array:
    return rng.exponential(size=n) - 1


def log_normal(rng: np.random.Generator, n: int) -> Array:
    return rng.lognormal(size=n) - math.exp(0.5)


def bootstrap_coverage(draw: Callable[..., Array], n: int, trials: int) -> float:
    rng = np.random.default_rng([n, trials])
    bases = rng.normal(size=(trials, n))
    return float(np.mean([holds(paired_difference(base + draw(rng, n), base), 0.0) for base in bases]))


CASES = [
    (normal, 5, 0.95),
    (normal, 10, 0.944),
    (normal, 20, 0.95),
    (normal, 60, 0.95),
    (exponential, 20, 0.934),
    (exponential, 60, 0.943),
    (log_normal, 20, 0.905),  # what is known to fall short: the tail is not in so few values
]


@pytest.mark.parametrize(("draw", "n", "expected"), CASES)
def test_the_interval_of_real_values_holds_the_true_difference(
    draw: Callable[..., Array], n: int, expected: float
) -> None:
    error = math.sqrt(expected * (1 - expected) / 200)
    assert bootstrap_coverage(draw, n, 200) == pytest.approx(expected, abs=3.5 * error)


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "n", "expected"), [*CASES, (log_normal, 200, 0.925), (normal, 200, 0.95)])
def test_so_it_does_in_many_trials(draw: Callable[..., Array], n: int, expected: float) -> None:
    assert bootstrap_coverage(draw, n, 1000) == pytest.approx(expected, abs=0.025)  # 3.5 standard errors


def test_the_error_of_non_inferiority_with_real_values() -> None:
    rng = np.random.default_rng(5)
    found = [paired_difference(rng.normal(-0.3, 1, size=30), np.zeros(30)) for _ in range(250)]
    assert np.mean([non_inferiority(one, 0.3).verdict == "holds" for one in found]) <= 0.025 + 3 * 0.0099


# -- win rates at equal length ----------------------------------------------------------------------------------------


def simulated_win_rates(
    n: int, trials: int, merit: float, pull: float, longer: float, ties: float = 0.0
) -> tuple[float, float, float]:
    """Shares of trials whose controlled and raw intervals hold the rate at equal length; the mean controlled rate.

    The arm's answers differ from base's by 20 (N(0, 1) + `longer`) tokens; it wins with the log-odds
    `merit + pull tanh(difference / 20)`, and a share of the pairs are ties instead.
    """
    rng = np.random.default_rng(n)
    truth = (1 - ties) * float(logistic(merit)) + ties / 2
    controlled, raw, rates = 0, 0, 0.0
    for _ in range(trials):
        base_lengths = rng.lognormal(3, 0.4, size=n)
        differences = 20 * (rng.normal(size=n) + longer)
        wins = (rng.random(n) < logistic(merit + pull * np.tanh(differences / 20))).astype(float)
        wins[rng.random(n) < ties] = 0.5
        found = win_rates(wins, base_lengths + differences, base_lengths)
        controlled += found.length_controlled_low <= truth <= found.length_controlled_high
        raw += found.raw_low <= truth <= found.raw_high
        rates += found.length_controlled
    return controlled / trials, raw / trials, rates / trials


@pytest.mark.parametrize(("n", "pull", "longer"), [(50, 2.0, 1.0), (100, 2.0, 1.0), (400, 4.0, 1.5)])
def test_where_only_length_wins_a_half_is_in_the_controlled_interval_and_not_in_the_raw_one(
    n: int, pull: float, longer: float
) -> None:
    controlled, raw, rate = simulated_win_rates(n, 400, 0.0, pull, longer)
    assert 0.917 <= controlled <= 0.985 and raw < 0.15
    assert rate == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("n", "merit", "pull", "longer"), [(50, 1.0, 1.0, 0.5), (100, 1.0, 0.0, 0.0), (100, 2.0, 1.0, 0.5), (400, -1, 3, 1)]
)
def test_the_controlled_interval_holds_the_true_rate(n: int, merit: float, pull: float, longer: float) -> None:
    controlled, _, rate = simulated_win_rates(n, 400, merit, pull, longer)
    assert 0.917 <= controlled <= 0.98
    assert rate == pytest.approx(float(logistic(merit)), abs=0.02)


def test_with_20_pairs_or_with_ties_it_is_on_the_wide_side() -> None:
    assert simulated_win_rates(20, 400, 1.0, 1.0, 0.5)[0] >= 0.95
    assert simulated_win_rates(100, 400, 0.0, 2.0, 1.0, ties=0.3)[0] >= 0.96


# -- over-optimisation ------------------------------------------------------------------------------------------------

ROSE = normal_difference(1.0, 0.1)
"""By one standard deviation, which is 0.1 sqrt(100)."""


@pytest.mark.parametrize(
    ("own", "referee", "expected"),
    [
        (ROSE, normal_difference(0.3, 0.1), False),
        (ROSE, normal_difference(-0.3, 0.1), True),
        (ROSE, normal_difference(0.0, 0.1), True),  # the interval ends at 0.2 standard deviations, under 0.5
        (ROSE, normal_difference(0.0, 7.0), True),  # so it does in another unit
        (ROSE, normal_difference(0.0, 0.1, 4), None),  # with 4 items it ends at one standard deviation
        (normal_difference(0.1, 0.1), normal_difference(-0.3, 0.1), None),
        (normal_difference(0.3, 0.1), normal_difference(0.0, 0.1), None),  # a small gain, which 0.2 does not exclude
        (ROSE, Difference(0.0, 0.0, 0.0, 0.0, 100), True),
        (Difference(1.0, 1.0, 1.0, 0.0, 100), normal_difference(0.0, 0.1), None),
        (ROSE, Difference(1.0, None, None, 0.0, 1), None),
        (Difference(1.0, None, None, 0.0, 1), ROSE, None),
    ],
)
def test_whether_the_referee_followed(own: Difference, referee: Difference, expected: bool | None) -> None:
    assert over_optimised(own, referee) is expected


@pytest.mark.parametrize(("n", "gain"), [(20, 1.0), (100, 0.5), (400, 0.3)])
def test_how_often_the_verdict_on_the_referee_is_wrong(n: int, gain: float) -> None:
    rng = np.random.default_rng(n)

    def found(share: float) -> list[bool | None]:
        draws = rng.normal([[[gain]], [[share * gain]]], 1, size=(2, 1000, n))
        values, errors = draws.mean(2), draws.std(2, ddof=1) / math.sqrt(n)
        own, referee = (
            [normal_difference(*pair, n) for pair in zip(*side, strict=True)]
            for side in zip(values, errors, strict=True)
        )
        return [over_optimised(*pair) for pair in zip(own, referee, strict=True)]

    assert np.mean([verdict is True for verdict in found(1.0)]) <= 0.015
    assert np.mean([verdict is True for verdict in found(0.5)]) <= 0.08
    nothing = found(0.0)
    assert np.mean([verdict is False for verdict in nothing]) <= 0.05
    assert np.mean([verdict is True for verdict in nothing]) >= 0.5
