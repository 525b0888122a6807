"""The statistics of the evaluation: intervals, paired differences, non-inferiority, win rates at equal length.

An arm and base answer the same items, so every comparison is of pairs. Nothing here returns nan or infinity: what
cannot be known is None, so that `dataclasses.asdict` of every result goes to JSON as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit
from scipy.stats import bootstrap, norm, t

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 9999
BOOTSTRAP_SEED = 0
RESAMPLED_NUMBERS_AT_ONCE = 4_000_000
"""Bounds the bootstrap's memory: 32 MB of float64, whatever the number of items."""
FEWEST_TO_BOOTSTRAP = 10
"""No resample's mean leaves the range of the data, which with fewer items is too narrow a range."""
STEPS = 2.0**30
"""The bootstrap reads differences in steps of the largest deviation over this: relative errors of 1e-9."""
RIDGE = 0.1
"""Of the length-controlled fit: a normal prior with a standard deviation of sqrt(10) logits on both coefficients."""
FOLLOWED_SHARE = 0.5
"""A referee that rises by less than this share of the maximised reward's gain does not follow it."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean.

    Attributes:
        value: the mean of `n` values.
        stderr: its standard error; 0 for one value, from which none can be had.
        n: how many values.
    """

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean difference to base over the same items, with its interval (95 % unless asked otherwise).

    Attributes:
        value: arm minus base.
        low: lower end of the interval; None where one item gives no interval.
        high: upper end; None where `low` is.
        stderr: standard error; 0 for one item, from which none can be had.
        n: how many pairs, over all tasks where tasks are pooled.
    """

    value: float
    low: float | None
    high: float | None
    stderr: float
    n: int


@dataclass(frozen=True)
class NonInferiority:
    """Whether an arm loses less than a margin.

    Attributes:
        verdict: "holds": the whole interval is above minus the margin; "does not hold": all of it is below; else
            "cannot tell".
        needed_n: where it cannot be told, how many items make half the interval's width smaller than the margin, so
            that an observed difference of 0 would have held. None where it was told, or where the interval is narrow
            enough already and lies across minus the margin.
    """

    verdict: Literal["holds", "does not hold", "cannot tell"]
    needed_n: int | None


@dataclass(frozen=True)
class WinRate:
    """The share of `n` pairs that an arm wins, ties counting half, with 95 % intervals.

    Attributes:
        raw: the plain share, between `raw_low` and `raw_high`.
        length_controlled: what the share would be if both answers were equally long, between its own low and high.
    """

    raw: float
    raw_low: float
    raw_high: float
    length_controlled: float
    length_controlled_low: float
    length_controlled_high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values` and its standard error, which is sd (with n - 1) over sqrt(n).

    Raises:
        ValueError: no value, or one that is not finite.
    """
    numbers = _finite(values)
    return Estimate(float(numbers.mean()), _standard_error(numbers), numbers.size)


def paired_difference(
    values: Sequence[float], base_values: Sequence[float], confidence: float = CONFIDENCE
) -> Difference:
    """Return the mean of `values[i] - base_values[i]` with a two-sided interval.

    - Only 0 and 1 on both sides: the score interval of Tango (1998, *Equivalence test and confidence interval for the
      difference in proportions for the paired-sample design*, Statistics in Medicine 17). It has a width even where no
      pair differs, and keeps its level where only losses are seen, as the adjusted Wald interval of Agresti and Min
      (2005) does not. `stderr` is half its width over the normal quantile.
    - Anything else: the bootstrap over pairs, BCa (Efron 1987), at the level that makes the interval of normal data as
      wide as Student's (Hesterberg 2015, *What teachers should know about the bootstrap*, The American Statistician
      69), without which it is too narrow under some 50 pairs. The seed is fixed.
    - Under ten such pairs: Student's t.

    Where all of several differences are equal (the arm is base, say) the interval has no width: such data say nothing
    about their spread. Heavy tails at small n remain hard: with 20 log-normal differences it covers 91 %, not 95 %.

    Raises:
        ValueError: no pair, sides of unequal length, or a number that is not finite.
    """
    ours, base = _finite(values), _finite(base_values)
    if ours.size != base.size:
        raise ValueError(f"{ours.size} values cannot be paired with {base.size}")
    differences = ours - base
    value, n = float(differences.mean()), differences.size
    binary = bool(np.isin(ours, (0, 1)).all() and np.isin(base, (0, 1)).all())
    if n == 1:
        return Difference(value, None, None, 0.0, n)
    if binary:
        return _difference_of_proportions(int((differences > 0).sum()), int((differences < 0).sum()), n, confidence)
    stderr = _standard_error(differences)
    if np.ptp(differences) == 0:
        return Difference(value, value, value, stderr, n)
    if n < FEWEST_TO_BOOTSTRAP:
        half = float(t.ppf((1 + confidence) / 2, n - 1)) * stderr
        return Difference(value, value - half, value + half, stderr, n)
    low, high = _bootstrap_interval(differences, confidence)
    return Difference(value, low, high, stderr, n)


def pooled_difference(parts: Sequence[Difference]) -> Difference:
    """Return the mean over tasks, each task weighing the same, with a normal 95 % interval.

    The tasks' items are independent, so the standard error is sqrt(sum of squares) / number of tasks. A task with no
    interval leaves the whole without one.

    Raises:
        ValueError: no part.
    """
    if not parts:
        raise ValueError("there is no task to pool")
    value = math.fsum(part.value for part in parts) / len(parts)
    stderr = math.hypot(*(part.stderr for part in parts)) / len(parts)
    n = sum(part.n for part in parts)
    if any(part.low is None for part in parts):
        return Difference(value, None, None, stderr, n)
    half = _normal_quantile(CONFIDENCE) * stderr
    return Difference(value, value - half, value + half, stderr, n)


def non_inferiority(difference: Difference, margin: float) -> NonInferiority:
    """Return whether the arm is at most `margin` (> 0, in the unit of the difference) worse than base.

    With a 95 % interval, an arm that truly loses the margin is said to hold in 2.5 % of cases. `needed_n` lets the
    width shrink as 1 / sqrt(n), and for a pooled difference counts all items, the tasks keeping their shares. It is
    where a true difference of 0 has even odds to be shown; twice as many items give 79 %.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"the margin must be above 0, not {margin}")
    if difference.low is None or difference.high is None:
        return NonInferiority("cannot tell", None)
    if difference.low > -margin:
        return NonInferiority("holds", None)
    if difference.high < -margin:
        return NonInferiority("does not hold", None)
    half_in_margins = (difference.high - difference.low) / 2 / margin
    needed = math.floor(difference.n * half_in_margins**2) + 1
    return NonInferiority("cannot tell", needed if half_in_margins >= 1 else None)


def wilson_interval(wins: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927), ends in [0, 1].

    `wins` may hold halves, for ties: they vary less than wins and losses do, so the interval is then on the wide side.

    Raises:
        ValueError: `n` under 1, or `wins` outside 0 to n.
    """
    if n < 1 or not 0 <= wins <= n:
        raise ValueError(f"{wins} wins of {n} is not a proportion")
    z = _normal_quantile(confidence)
    share, shrink = wins / n, 1 / (1 + z * z / n)
    centre = (share + z * z / (2 * n)) * shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) * shrink
    # at either end the bound is exact, where the sum would leave rounding
    return (0.0 if wins == 0 else centre - half), (1.0 if wins == n else centre + half)


def win_rates(wins: Sequence[float], lengths: Sequence[float], base_lengths: Sequence[float]) -> WinRate:
    """Return the raw and the length-controlled win rate of an arm against base.

    Length control is that of Dubois et al. 2024 (*Length-Controlled AlpacaEval*, arXiv 2404.04475, section 3) without
    its term per instruction: the outcome is regressed, logistically, on an intercept and on tanh(d / sd(d)) where
    d = length - base length; the rate is sigmoid(intercept), the model's answer for d = 0. A small ridge (`RIDGE`) on
    both keeps it finite where the data are separable. Its interval is from the curvature at the optimum, made on the
    logit scale; the raw rate's is Wilson's.

    Where every answer is as long as base's, the controlled rate is the raw one, drawn towards a half by the ridge.
    Where the arm is always longer (or shorter) by about the same, length and merit cannot be told apart: the
    controlled rate then lies about halfway to a half, in logits, and its interval is as wide as that deserves.

    Args:
        wins: per pair 1, 0.5 (tie) or 0.
        lengths: of the arm's answers, in any unit.
        base_lengths: of base's, in the same unit.

    Raises:
        ValueError: no pair, sequences of unequal length, other outcomes, or a length that is not finite.
    """
    outcome, ours, base = _finite(wins), _finite(lengths), _finite(base_lengths)
    if not outcome.size == ours.size == base.size:
        raise ValueError(f"{outcome.size} outcomes, {ours.size} lengths and {base.size} base lengths are not pairs")
    if not np.isin(outcome, (0, 0.5, 1)).all():
        raise ValueError("an outcome is 1, 0.5 or 0")
    intercept, stderr = _fit_at_equal_length(outcome, _length_feature(ours - base))
    half = _normal_quantile(CONFIDENCE) * stderr
    controlled, low, high = (float(expit(logit)) for logit in (intercept, intercept - half, intercept + half))
    raw_low, raw_high = wilson_interval(float(outcome.sum()), outcome.size)
    return WinRate(float(outcome.mean()), raw_low, raw_high, controlled, low, high, outcome.size)


def over_optimised(own: Difference, referee: Difference) -> bool | None:
    """Return whether the reward that was maximised rose while a referee, which was not, did not follow; None: unclear.

    Gains are compared in standard deviations of their own per-item differences, as the two have no common unit.

    - False: both rose (both intervals are above 0).
    - True: the maximised reward rose, and the referee's interval either has nothing above 0, or reaches to 0 and ends
      below half the maximised reward's gain.
    - None: all else: no rise to judge, no interval, or a referee's interval so wide that it reaches from 0 to half
      the gain.

    In simulation (20 to 400 items), a referee that truly rises as much is called over-optimised in about 1 % of cases,
    one that rises half as much in up to 6 %; one that does not rise at all is cleared in about 3 %.
    """
    if own.low is None or referee.low is None or referee.high is None or own.low <= 0:
        return None
    if referee.low > 0:
        return False
    if referee.high <= 0:
        return True
    own_spread, referee_spread = own.stderr * math.sqrt(own.n), referee.stderr * math.sqrt(referee.n)
    if own_spread == 0:  # a gain with no spread has no size in units of it
        return None
    followed = referee.high * own_spread >= FOLLOWED_SHARE * own.value * referee_spread
    return None if followed else True


def _finite(values: Sequence[float]) -> Array:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError("statistics need at least one value, and finite ones")
    return numbers


def _standard_error(numbers: Array) -> float:
    if numbers.size == 1 or np.ptp(numbers) == 0:  # where all are equal, the rounded mean leaves a trace of spread
        return 0.0
    return float(numbers.std(ddof=1)) / math.sqrt(numbers.size)


def _normal_quantile(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2))


def _difference_of_proportions(gained: int, lost: int, n: int, confidence: float) -> Difference:
    z = _normal_quantile(confidence)
    low, high = -_highest_difference(lost, gained, n, z), _highest_difference(gained, lost, n, z)
    return Difference((gained - lost) / n, low, high, (high - low) / (2 * z), n)


def _highest_difference(gained: int, lost: int, n: int, z: float) -> float:
    """Return the difference of proportions above the observed one that the score test just does not reject."""

    def score(difference: float) -> float:
        # the likeliest probability of a loss under this difference solves 2n q² + b q + c = 0 (Tango 1998)
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        loss = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * loss + difference * (1 - difference))
        return gained - lost - n * difference + z * math.sqrt(max(0.0, variance))

    if gained == n:
        return 1.0
    # at the observed difference itself the score is 0 too where the variance there is
    return float(brentq(score, (gained - lost) / n + 1e-9, 1.0))


def _bootstrap_interval(differences: Array, confidence: float) -> tuple[float, float]:
    n = differences.size
    student = t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
    centre = differences.mean()
    reach = np.abs(differences - centre).max()
    # sums of whole numbers are exact: BCa counts resamples that tie with the data, which rounding would sway
    steps = np.round((differences - centre) / reach * STEPS)
    found = bootstrap(
        (steps,),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=max(1, RESAMPLED_NUMBERS_AT_ONCE // n),
        confidence_level=2 * float(norm.cdf(student)) - 1,
        method="BCa",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(centre + found.low / STEPS * reach), float(centre + found.high / STEPS * reach)


def _length_feature(differences: Array) -> Array:
    spread = differences.std()
    # as the spread goes to 0, tanh goes to the sign
    return np.tanh(differences / spread) if spread > 0 else np.sign(differences)


def _fit_at_equal_length(outcome: Array, feature: Array) -> tuple[float, float]:
    """Return the intercept, in logits, and its standard error."""
    design = np.column_stack([np.ones_like(feature), feature])

    def loss(coefficients: Array) -> float:
        logits = design @ coefficients
        return float((np.logaddexp(0, logits) - outcome * logits).sum() + RIDGE / 2 * coefficients @ coefficients)

    def gradient(coefficients: Array) -> Array:
        return design.T @ (expit(design @ coefficients) - outcome) + RIDGE * coefficients

    def curvature(coefficients: Array) -> Array:
        rate = expit(design @ coefficients)
        return (design.T * (rate * (1 - rate))) @ design + RIDGE * np.eye(2)

    fit = minimize(loss, np.zeros(2), jac=gradient, hess=curvature, method="trust-exact")
    return float(fit.x[0]), math.sqrt(np.linalg.inv(curvature(fit.x))[0, 0])
