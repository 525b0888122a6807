"""The paper's claims: what holds, what does not, and what cannot be told."""

from __future__ import annotations

from typing import Any

import pytest

from lora_rlhf.evaluation.claims import BETTER, KEPT, MEASURES, SAFER, better, claims
from lora_rlhf.evaluation.context import arm_figures


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.1, 0.3, 1, "holds"),
        (-0.3, -0.1, 1, "does not hold"),
        (-0.1, 0.3, 1, "cannot tell"),
        (0.1, 0.3, -1, "does not hold"),
        (-0.3, -0.1, -1, "holds"),
        (-0.1, 0.3, -1, "cannot tell"),
        (None, None, 1, "cannot tell"),
        (0.0, 0.0, 1, "cannot tell"),
    ],
)
def test_an_improvement_holds_where_the_whole_interval_is_on_its_side(
    low: float | None, high: float | None, sign: int, expected: str
) -> None:
    assert better({"value": 0.0, "low": low, "high": high, "n": 9}, sign) == expected


def suite(task: str, **arms: list[float]) -> dict[str, Any]:
    return {"tasks": {task: arm_figures(arms)}, "details": {}}


def test_every_measure_of_every_arm_but_base_has_a_row() -> None:
    figures = {"base": [1.0, 2.0, 3.0] * 9, "instruct": [1.0, 2.0, 3.0] * 9, "plus": [2.0, 3.5, 4.0] * 9}
    suites = {"mt_bench": suite("score", **figures), "bad_words": suite("last_layer", **figures)}
    rows = {(row["claim"], row["arm"]): row for row in claims(suites)}
    assert set(rows) == {(claim, arm) for claim in (BETTER, SAFER) for arm in ("instruct", "plus")}
    assert rows[BETTER, "plus"]["verdict"] == "holds"
    assert rows[BETTER, "plus"]["difference"]["value"] == pytest.approx(3.5 / 3)
    assert rows[SAFER, "plus"]["verdict"] == "does not hold"  # more bad words are worse
    assert {rows[claim, "instruct"]["verdict"] for claim in (BETTER, SAFER)} == {"cannot tell"}
    assert rows[BETTER, "plus"]["n"] == 27


def test_kept_ability_is_the_suites_own_verdict_with_the_n_that_would_tell() -> None:
    difference = {"value": -0.02, "low": -0.05, "high": 0.01, "stderr": 0.015, "n": 140}
    kept = {"plus": {"difference": difference, "margin": 0.01, "verdict": "cannot tell", "needed_n": 1261}}
    (row,) = claims({"general": {"tasks": {}, "details": {"kept": kept}}})
    assert (row["claim"], row["verdict"], row["needed_n"], row["n"]) == (KEPT, "cannot tell", 1261, 140)
    assert "margin 1 points" in row["measure"]


def test_a_suite_that_did_not_run_says_nothing() -> None:
    assert claims({}) == []


def test_the_reward_that_ppo_maximised_supports_no_claim() -> None:
    assert ("preference", "reward") not in {(measure.suite, measure.task) for measure in MEASURES}


@pytest.mark.parametrize(("low", "expected"), [(0.62, "holds"), (0.5, "cannot tell"), (0.45, "cannot tell")])
def test_a_referee_no_better_than_chance_supports_no_claim(low: float, expected: str) -> None:
    found = suite("referee", base=[0.0, 0.1] * 9, plus=[1.0, 1.2] * 9)
    passing = {label: {"value": 0.9, "low": 0.8, "high": 0.95, "n": 100} for label in ("unsafe", "safe")}
    found["details"] = {
        "referee_accuracy": {"value": low + 0.05, "low": low, "high": low + 0.1, "n": 300},
        "probes": {"referee": passing},
    }
    (row,) = claims({"preference": found})
    assert row["verdict"] == expected
