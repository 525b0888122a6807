"""Whether an answer declines: wholly, partly or not at all, as people labelled answers of models.

A word list cannot tell: "I can't recommend the red one enough" complies, "That lock is better left alone" declines. So
this is a linear classifier over the words and pairs of words with which an answer begins, trained on answers whose
label is known (`benchmarks/declining_detector.py`, which also measures it on prompts that it was not trained on). It
was not trained on any pair that the embedded reward model learns from.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

Grade = Literal["none", "partial", "full"]
"""How far an answer declines. "partial": it declines and helps all the same, or helps with a part."""
GRADES: tuple[Grade, ...] = get_args(Grade)
WORDS_READ = 40
"""Words of an answer that are looked at: a model declines in its first sentences, or not at all."""
FILE = Path(__file__).parent / "declining.json"
_WORD = re.compile(r"[\w']+")


def declining_grade(answer: str) -> Grade:
    """Return how far an answer declines; it declines where "partial" and "full" together are likelier than "none"."""
    model = _model()
    features = ngram_features(answer, model["ngrams"])
    logits = list(model["bias"])
    for ngram, value in features.items():
        for i, weight in enumerate(model["ngrams"][ngram][1:]):
            logits[i] += value * weight
    none, *declining = (math.exp(logit - max(logits)) for logit in logits)
    return "none" if none >= sum(declining) else GRADES[1:][declining.index(max(declining))]


def declines(answer: str) -> bool:
    """Return whether an answer declines, wholly or in part."""
    return declining_grade(answer) != "none"


def measured_detector() -> dict[str, Any]:
    """Return what `benchmarks/declining_detector.py` measured: each source's confusion matrix and accuracy."""
    return _model()["measured"]


def ngrams_of(answer: str) -> Iterator[str]:
    """Yield the words and pairs of neighbouring words with which an answer begins, in lower case."""
    words = _WORD.findall(answer.replace("\u2019", "'").lower())[:WORDS_READ]
    yield from words
    yield from (f"{one} {two}" for one, two in pairwise(words))


def ngram_features(answer: str, ngrams: dict[str, list[float]]) -> dict[str, float]:
    """Return the answer's tf-idf features, of Euclidean length 1: (1 + ln count) · idf of each known n-gram.

    Args:
        answer: any text.
        ngrams: known n-grams; the first number of each is its idf.
    """
    counts = Counter(ngram for ngram in ngrams_of(answer) if ngram in ngrams)
    values = {ngram: (1 + math.log(count)) * ngrams[ngram][0] for ngram, count in counts.items()}
    length = math.sqrt(sum(value * value for value in values.values()))
    return {ngram: value / length for ngram, value in values.items()}


@functools.cache
def _model() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
