"""Estimates, paired differences, non-inferiority and win rates: values by hand, scipy's own answers, and laws."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from lora_rlhf.evaluation.statistics import (
    RIDGE,
    Difference,
    Estimate,
    NonInferiority,
    estimate,
    non_inferiority,
    paired_difference,
    pooled_difference,
    wilson_interval,
    win_rates,
)

Z2 = 1.959963984540054**2
numbers = st.floats(-1000, 1000).map(lambda x: round(x, 3))
paired_numbers = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30)
paired_outcomes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
outcomes_and_lengths = st.lists(
    st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=40
)


def outcomes(gained: int, lost: int, n: int) -> tuple[list[int], list[int]]:
    """`n` pairs of 0/1 outcomes of which `gained` went from 0 to 1 and `lost` from 1 to 0."""
    same = n - gained - lost
    return [1] * gained + [0] * lost + [1] * same, [0] * gained + [1] * lost + [1] * same


def interval(difference: Difference) -> tuple[float, float]:
    assert difference.low is not None and difference.high is not None
    return difference.low, difference.high


def normal_difference(value: float, stderr: float, n: int = 100) -> Difference:
    return Difference(value, value - 2 * stderr, value + 2 * stderr, stderr, n)


# -- estimates --------------------------------------------------------------------------------------------------------


def test_a_mean_and_its_standard_error_by_hand() -> None:
    assert estimate([1, 2, 3, 6]) == Estimate(3.0, pytest.approx(math.sqrt(14 / 3) / 2), 4)
    assert estimate([5.0]) == Estimate(5.0, 0.0, 1)
    assert estimate([0.1] * 7).stderr == 0.0


@given(st.lists(numbers, min_size=2, max_size=30))
def test_the_standard_error_is_scipys(values: list[float]) -> None:
    found = estimate(values)
    assert found.stderr == pytest.approx(stats.sem(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.value <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_no_value_and_values_that_are_not_finite_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate(values)
    with pytest.raises(ValueError, match="finite"):
        paired_difference(values, values)


# -- paired differences -----------------------------------------------------------------------------------------------


def test_the_interval_of_outcomes_is_the_published_score_interval() -> None:
    # Cavo et al. 2012, 161 patients of whom 6 and 16 changed: Fagerland, Lydersen and Laake 2017, chapter 8
    found = paired_difference(*outcomes(6, 16, 161))
    assert found.value == pytest.approx(-10 / 161)
    assert interval(found) == pytest.approx((-0.1240, -0.0054), abs=5e-5)


@pytest.mark.parametrize("n", [2, 20, 200, 5000])
def test_where_no_pair_differs_the_interval_still_has_a_width(n: int) -> None:
    # without a discordant pair the score test's n D² / (D (1 - D)) = z² gives D = z² / (n + z²), on either side
    end = Z2 / (n + Z2)
    found = paired_difference(*outcomes(0, 0, n))
    assert (found.value, *interval(found)) == (0.0, pytest.approx(-end), pytest.approx(end))
    assert found.stderr == pytest.approx(end / math.sqrt(Z2))


def test_where_every_pair_differs_the_interval_ends_at_one() -> None:
    # all gained: the likeliest loss under D is 0.5 - D / 2, so n (1 - D)² / (1 - D²) = z², D = (n - z²) / (n + z²)
    found = paired_difference(*outcomes(20, 0, 20))
    assert (found.value, *interval(found)) == (1.0, pytest.approx((20 - Z2) / (20 + Z2)), 1.0)


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 1, 20), (0, 4, 20), (12, 5, 50), (90, 110, 200)])
def test_at_both_ends_the_score_test_rejects_by_a_hair(gained: int, lost: int, n: int) -> None:
    for end, sign in zip(interval(paired_difference(*outcomes(gained, lost, n))), (1, -1), strict=True):
        counts = np.array([gained, lost, n - gained - lost])

        def surprise(loss: float, end: float = end, counts: np.ndarray = counts) -> float:
            chances = np.clip([loss + end, loss, 1 - 2 * loss - end], 1e-300, 1)
            return -float(counts @ np.log(chances))

        bounds = (max(0.0, -end), (1 - end) / 2)
        loss = optimize.minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        z = ((gained - lost) / n - end) / math.sqrt((2 * loss + end - end**2) / n)
        assert z == pytest.approx(sign * math.sqrt(Z2), rel=1e-3)


@given(paired_outcomes)
def test_the_interval_of_outcomes_holds_the_value_and_stays_in_range(pairs: list[tuple[int, int]]) -> None:
    ours, base = zip(*pairs, strict=True)
    found = paired_difference(ours, base)
    low, high = interval(found)
    assert -1 <= low <= found.value <= high <= 1 and low < high and found.stderr > 0


def test_the_interval_of_normal_data_is_close_to_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    for n in (12, 40, 300):
        base = rng.normal(size=n)
        ours = base + 0.3 + 0.5 * rng.normal(size=n)
        found, student = paired_difference(ours, base), stats.ttest_rel(ours, base)
        low, high = student.confidence_interval(0.95)
        assert found.value == pytest.approx((low + high) / 2)
        assert found.value / found.stderr == pytest.approx(student.statistic)
        assert interval(found) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_the_interval_of_a_dozen_normal_values_is_as_wide_as_students_on_average() -> None:
    widths = []
    for values in np.random.default_rng(4).normal(size=(60, 12)):
        low, high = interval(paired_difference(values, [0.0] * 12))
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 11) * stats.sem(values)))
    assert np.mean(widths) == pytest.approx(1, abs=0.05)  # plain BCa's are 0.86


def test_with_few_pairs_the_interval_is_students() -> None:
    ours, base = [3.0, 5.0, 4.0, 9.0], [1.0, 4.0, 4.0, 2.0]
    assert interval(paired_difference(ours, base)) == pytest.approx(stats.ttest_rel(ours, base).confidence_interval())
    narrow = paired_difference(ours, base, confidence=0.5)
    assert interval(narrow) == pytest.approx(stats.ttest_rel(ours, base).confidence_interval(0.5))


def test_skewed_differences_get_a_skewed_interval() -> None:
    found = paired_difference(np.random.default_rng(0).exponential(size=40), [0.0] * 40)
    low, high = interval(found)
    assert high - found.value > 1.1 * (found.value - low)


@pytest.mark.parametrize("values", [[1.0] * 19 + [1 + 2.3e-16], [0.3 - 0.2, 0.2 - 0.1] * 10, [0.0] * 19 + [5e-324]])
def test_differences_that_are_equal_but_for_rounding_give_an_interval_without_warnings(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(values, [0.0] * 20)
    assert interval(found) == pytest.approx((values[0], values[0]))


def test_the_interval_of_coarse_values_does_not_hang_on_their_rounding() -> None:
    grades = [1, 1, -1, 0, 0, 0, 0, 0, 0, 2, 0, 0]
    sixths = paired_difference([one / 6 for one in grades], [0.0] * 12)
    whole = paired_difference([3.0 * one for one in grades], [0.0] * 12)
    assert interval(sixths) == pytest.approx([end / 18 for end in interval(whole)], rel=1e-6)


def test_equal_differences_give_no_width_and_one_pair_no_interval() -> None:
    assert paired_difference([2.5] * 30, [2.0] * 30) == Difference(0.5, 0.5, 0.5, 0.0, 30)
    assert paired_difference([2.5], [2.0]) == Difference(0.5, None, None, 0.0, 1)
    assert paired_difference([1], [0]) == Difference(1.0, None, None, 0.0, 1)


@settings(max_examples=30)
@given(paired_numbers)
def test_the_difference_to_base_is_minus_that_of_base(pairs: list[tuple[float, float]]) -> None:
    ours, base = zip(*pairs, strict=True)
    there, back = paired_difference(ours, base), paired_difference(base, ours)
    assert there.value == -back.value and there.stderr == pytest.approx(back.stderr)
    assert interval(there) == pytest.approx((-interval(back)[1], -interval(back)[0]), rel=1e-6, abs=1e-6)


@given(paired_outcomes)
def test_so_is_that_of_outcomes(pairs: list[tuple[int, int]]) -> None:
    ours, base = zip(*pairs, strict=True)
    there, back = paired_difference(ours, base), paired_difference(base, ours)
    assert (there.value, *interval(there)) == (-back.value, -interval(back)[1], -interval(back)[0])


@settings(max_examples=20)
@given(paired_numbers, st.floats(0.1, 10))
def test_the_interval_scales_with_the_unit_and_widens_with_confidence(
    pairs: list[tuple[float, float]], unit: float
) -> None:
    ours, base = np.array(pairs).T + 0.25  # never 0/1 outcomes
    found, scaled = paired_difference(ours, base), paired_difference(unit * ours, unit * base)
    assert interval(scaled) == pytest.approx([unit * end for end in interval(found)], rel=1e-6, abs=1e-6)
    narrow_low, narrow_high = interval(paired_difference(ours, base, confidence=0.8))
    low, high = interval(found)
    assert low <= narrow_low + 1e-9 and narrow_high <= high + 1e-9


def test_the_same_data_give_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=(2, 60))
    assert paired_difference(*values) == paired_difference(*values)


def test_sides_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])


# -- tasks pooled -----------------------------------------------------------------------------------------------------


def test_tasks_pool_by_hand() -> None:
    # standard errors 3 and 4 make sqrt(9 + 16) / 2 = 2.5; a task counts once however many items it has
    found = pooled_difference([normal_difference(1, 3, 10), normal_difference(4, 4, 990)])
    half = math.sqrt(Z2) * 2.5
    assert found == Difference(2.5, pytest.approx(2.5 - half), pytest.approx(2.5 + half), 2.5, 1000)


def test_a_task_without_interval_leaves_the_whole_without_one() -> None:
    found = pooled_difference([normal_difference(1, 3), paired_difference([2], [1])])
    assert (found.value, found.low, found.high, found.n) == (1.0, None, None, 101)
    with pytest.raises(ValueError, match="no task"):
        pooled_difference([])


# -- non-inferiority --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.9, 3.0, NonInferiority("holds", None)),
        (-4.0, -1.1, NonInferiority("does not hold", None)),
        (-2.0, 2.0, NonInferiority("cannot tell", 401)),  # twice the margin: over four times the items
        (-4.0, 1.0, NonInferiority("cannot tell", 626)),  # half the width is 2.5 margins
        (-1.0, 1.0, NonInferiority("cannot tell", 101)),
        (-1.5, -0.5, NonInferiority("cannot tell", None)),  # narrow enough: it is the value that is near the margin
    ],
)
def test_verdicts_at_a_margin_of_one_with_100_items(low: float, high: float, expected: NonInferiority) -> None:
    assert non_inferiority(Difference((low + high) / 2, low, high, (high - low) / 4, 100), 1.0) == expected


def test_without_interval_nothing_can_be_told_and_a_margin_is_above_zero() -> None:
    assert non_inferiority(paired_difference([1], [1]), 0.01) == NonInferiority("cannot tell", None)
    for margin in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            non_inferiority(normal_difference(0, 1), margin)


@given(st.floats(-5, 5), st.floats(0.01, 5), st.integers(2, 10_000), st.floats(0.01, 5), st.floats(1, 3))
def test_a_wider_margin_never_turns_a_verdict_against_the_arm(
    value: float, stderr: float, n: int, margin: float, factor: float
) -> None:
    order = ["does not hold", "cannot tell", "holds"]
    found = normal_difference(value, stderr, n)
    narrow, wide = non_inferiority(found, margin), non_inferiority(found, margin * factor)
    assert order.index(narrow.verdict) <= order.index(wide.verdict)
    assert narrow.needed_n is None or narrow.needed_n > n
    if narrow.needed_n and wide.needed_n:
        assert wide.needed_n <= narrow.needed_n


def test_the_needed_items_are_enough_where_the_difference_is_zero() -> None:
    found = paired_difference(*outcomes(20, 20, 200))
    needed = non_inferiority(found, 0.02).needed_n
    assert needed == pytest.approx(0.2 * Z2 / 0.02**2, rel=0.1)  # a variance of 0.2 per pair, half the width 0.02
    assert needed is not None
    more = paired_difference(*outcomes(needed // 10, needed // 10, needed))
    assert non_inferiority(more, 0.02).verdict == "holds"
    fewer = int(0.95 * needed)
    assert non_inferiority(paired_difference(*outcomes(fewer // 10, fewer // 10, fewer)), 0.02).verdict == "cannot tell"


# -- win rates --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(n: int, data: st.DataObject, confidence: float) -> None:
    wins = data.draw(st.integers(0, n))
    expected = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(wins, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 400), st.data())
def test_ties_count_half_and_move_the_interval_on(n: int, data: st.DataObject) -> None:
    halves = data.draw(st.integers(0, 2 * n - 1))
    low, high = wilson_interval(halves / 2, n)
    higher_low, higher_high = wilson_interval((halves + 1) / 2, n)
    assert 0 <= low <= halves / 2 / n <= high <= 1
    assert low < higher_low and high < higher_high


@pytest.mark.parametrize(("wins", "n"), [(0, 0), (-0.5, 3), (4, 3), (float("nan"), 3)])
def test_what_is_no_proportion_is_refused(wins: float, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(wins, n)


@settings(max_examples=25)
@given(outcomes_and_lengths)
def test_the_controlled_rate_is_that_of_a_general_optimiser_on_the_same_loss(
    rows: list[tuple[float, int, int]],
) -> None:
    wins, lengths, base_lengths = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    differences = lengths - base_lengths
    feature = np.sign(differences) if differences.std() == 0 else np.tanh(differences / differences.std())

    def loss(x: np.ndarray) -> float:
        rate = np.clip(1 / (1 + np.exp(-(x[0] + x[1] * feature))), 1e-12, 1 - 1e-12)
        return -float((wins * np.log(rate) + (1 - wins) * np.log(1 - rate)).sum()) + RIDGE / 2 * float(x @ x)

    x = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-11}).x
    assert win_rates(wins, lengths, base_lengths).length_controlled == pytest.approx(1 / (1 + np.exp(-x[0])), abs=1e-4)


@settings(max_examples=50)
@given(outcomes_and_lengths)
def test_a_win_rate_and_the_rate_of_base_add_up_to_one(rows: list[tuple[float, int, int]]) -> None:
    wins, lengths, base_lengths = (list(column) for column in zip(*rows, strict=True))
    ours = win_rates(wins, lengths, base_lengths)
    base = win_rates([1 - win for win in wins], base_lengths, lengths)
    assert ours.raw + base.raw == pytest.approx(1)
    assert ours.length_controlled + base.length_controlled == pytest.approx(1, abs=1e-6)
    assert ours.length_controlled_low + base.length_controlled_high == pytest.approx(1, abs=1e-6)
    assert 0 <= ours.raw_low <= ours.raw <= ours.raw_high <= 1
    assert 0 < ours.length_controlled_low < ours.length_controlled < ours.length_controlled_high < 1


def test_at_equal_lengths_the_controlled_rate_is_the_raw_one_up_to_the_ridge() -> None:
    found = win_rates([1] * 140 + [0] * 60, [30] * 200, [30] * 200)
    assert found.raw == 0.7
    assert found.length_controlled == pytest.approx(0.7, abs=0.001) and found.length_controlled < 0.7
    assert (found.length_controlled_low, found.length_controlled_high) == pytest.approx(
        (found.raw_low, found.raw_high), abs=0.005
    )


def test_an_arm_that_is_always_longer_by_as_much_shows_nothing_about_equal_lengths() -> None:
    found = win_rates([1] * 160 + [0] * 40, [50] * 200, [30] * 200)
    assert found.length_controlled == pytest.approx(2 / 3, abs=0.01)  # half of the logit of 0.8, whose odds are 4
    assert found.length_controlled_low < 0.05 and found.length_controlled_high > 0.98


def test_separable_data_stay_finite() -> None:
    found = win_rates([1] * 10 + [0] * 10, [50] * 10 + [10] * 10, [30] * 20)
    assert found.length_controlled == pytest.approx(0.5, abs=1e-6)
    won = win_rates([1] * 20, range(20), [10] * 20)
    assert 0.95 < won.length_controlled < 1 and 0.7 < won.length_controlled_low < 0.85


@pytest.mark.parametrize(
    ("wins", "lengths", "base_lengths", "message"),
    [
        ([], [], [], "at least one"),
        ([1], [3, 4], [3], "not pairs"),
        ([0.7], [3], [3], "outcome"),
        ([1], [float("nan")], [3], "finite"),
    ],
)
def test_what_is_no_comparison_is_refused(
    wins: list[float], lengths: list[float], base_lengths: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        win_rates(wins, lengths, base_lengths)


# -- results as JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: estimate(np.arange(3)),
        lambda: paired_difference(np.arange(12.0), np.zeros(12)),
        lambda: paired_difference([1, 0], [True, True]),
        lambda: paired_difference([1], [2]),
        lambda: pooled_difference([paired_difference([1], [2])]),
        lambda: non_inferiority(paired_difference(*outcomes(1, 1, 20)), 0.01),
        lambda: win_rates(np.array([1, 0.5]), np.array([3, 3]), np.array([1, 4])),
    ],
)
def test_every_result_is_plain_json(make: Callable[[], object]) -> None:
    fields = asdict(make())  # type: ignore[call-overload]
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert all(type(value) in (float, int, str, type(None)) for value in fields.values())
