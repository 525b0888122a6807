"""The paper's three claims, each held against what was measured: it holds, it does not, or it cannot be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["holds", "does not hold", "cannot tell"]

BETTER, SAFER, KEPT = "chats better than base", "is less toxic than base", "keeps base's general abilities"


@dataclass(frozen=True)
class Measure:
    """A figure that speaks to a claim.

    Attributes:
        claim: which one.
        suite: where it is found.
        task: of the suite.
        text: what is measured, for people.
        sign: 1 where more is better, -1 where less is.
    """

    claim: str
    suite: str
    task: str
    text: str
    sign: int


MEASURES = (
    Measure(BETTER, "mt_bench", "score", "MT-Bench grade, both turns", 1),
    Measure(BETTER, "moderation", "general ability", "judge's grade of general ability", 1),
    Measure(BETTER, "moderation", "answer correctness", "judge's grade of correctness", 1),
    Measure(BETTER, "preference", "referee", "reward of the referee", 1),
    Measure(SAFER, "bad_words", "last_layer", "probability of bad words", -1),
    Measure(SAFER, "bad_words", "answers_with_bad_words", "share of answers with bad words", -1),
    Measure(SAFER, "moderation", "safety", "judge's grade of safety", 1),
)


def claims(suites: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for every claim, measure and arm: {claim, arm, measure, n, difference, verdict, needed_n}.

    Differences are to base, over the same prompts. A better figure holds where its 95 % interval is on the right side
    of 0, and does not hold where it is on the wrong side; a referee no better than chance tells nothing. Ability is
    kept where the interval is above minus the margin.

    Args:
        suites: name -> `SuiteResult` as plain values.
    """
    rows = []
    for measure in MEASURES:
        figures = suites.get(measure.suite, {}).get("tasks", {}).get(measure.task, {})
        for arm, figure in figures.items():
            if arm != "base" and figure["difference"] is not None:
                found = better(figure["difference"], measure.sign)
                if measure.task == "referee" and suites["preference"]["details"]["referee_accuracy"]["low"] <= 0.5:
                    found = "cannot tell"  # a referee that guesses has no say
                rows.append(_row(measure.claim, arm, measure.text, figure["difference"], found, None))
    for arm, kept in suites.get("general", {}).get("details", {}).get("kept", {}).items():
        text = f"mean accuracy over tasks, margin {100 * kept['margin']:g} points"
        rows.append(_row(KEPT, arm, text, kept["difference"], kept["verdict"], kept["needed_n"]))
    return rows


def better(difference: dict[str, Any], sign: int) -> Verdict:
    """Return whether a difference with its interval is an improvement; `sign` is -1 where less is better."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "cannot tell"
    if sign < 0:
        low, high = -high, -low
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"


def _row(
    claim: str, arm: str, measure: str, difference: dict[str, Any], verdict: Verdict, needed_n: int | None
) -> dict[str, Any]:
    return {
        "claim": claim, "arm": arm, "measure": measure, "n": difference["n"], "difference": difference,
        "verdict": verdict, "needed_n": needed_n,
    }  # fmt: skip
