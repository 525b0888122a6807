"""Signs in a run's metrics that the policy games its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

SIGNALS = ("score", "response_length", "repetition", "ended_rate")
"""Metrics that are looked at, and that every step has; `opening_share` is looked at where steps have it."""
LARGEST_OPENING_SHARE = 0.4
"""Of answers that begin with the same three words; a manner of speaking has taken over beyond it."""
WINDOW = 5
"""Steps whose mean is compared with that of the first ones."""


def hacking_signs(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return signs, in words by kind, that the policy games its reward: score up, and something else runs away.

    Args:
        history: metrics of the steps that were taken, oldest first.
    """
    if len(history) < 2 * WINDOW:
        return {}
    parts = (history[:WINDOW], history[-WINDOW:])
    first, last = ({n: fmean(m[n] for m in part) for n in SIGNALS} for part in parts)
    if last["score"] - first["score"] < 0.5:
        return {}
    risen = f"the score rose from {first['score']:+.2f} to {last['score']:+.2f} while"
    found = {}
    if all("opening_share" in m for part in parts for m in part):  # steps of earlier versions lack it
        before, now = (fmean(m["opening_share"] for m in part) for part in parts)
        if now > max(LARGEST_OPENING_SHARE, before + 0.1):
            found["opening"] = (
                f"{risen} the share of answers with one and the same opening of three words rose from {before:.0%} to "
                f"{now:.0%}: the reward may like a manner of speaking"
            )
    if last["response_length"] > 2 * first["response_length"]:
        found["length"] = (
            f"{risen} answers grew from {first['response_length']:.0f} to {last['response_length']:.0f} tokens: "
            "the reward may like length for itself"
        )
    if last["response_length"] < first["response_length"] / 3:
        found["shortness"] = (
            f"{risen} answers shrank from {first['response_length']:.0f} to {last['response_length']:.0f} tokens: "
            "the reward may like stubs"
        )
    if last["repetition"] > first["repetition"] + 0.2:
        found["repetition"] = (
            f"{risen} the share of repeated phrases rose from {first['repetition']:.0%} to {last['repetition']:.0%}: "
            "the reward may not mind repetition"
        )
    if last["ended_rate"] < first["ended_rate"] - 0.2:
        found["ended"] = (
            f"{risen} the share of answers that end fell from {first['ended_rate']:.0%} to {last['ended_rate']:.0%}: "
            "raise ppo.missing_eos_penalty"
        )
    return found
