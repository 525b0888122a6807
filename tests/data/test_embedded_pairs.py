"""The embedded preference pairs: enough of them, fit to print, truly held out, and no rule of thumb solves them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from lora_rlhf.data import rows
from lora_rlhf.data.preferences import PreferencePair, pair_from_row
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.evaluation.arms import bad_word_pattern

TRAIN = [pair_from_row(row) for row in dataset_rows("embedded", "train")]
TEST = [pair_from_row(row) for row in dataset_rows("embedded", "test")]
CHANCE_LIMIT = 0.65


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def column(pairs: Iterable[PreferencePair], name: str) -> list[str]:
    return [dict(pair.columns)[name] for pair in pairs]


def prompt_text(pair: PreferencePair) -> str:
    return "\n".join(content for _, content in pair.prompt)


def test_there_are_enough_pairs() -> None:
    assert len(TRAIN) >= 400
    assert len({pair.prompt for pair in TEST}) >= 100


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_the_files_are_printable_ascii(name: str) -> None:
    content = (Path(rows.__file__).parent / "embedded" / name).read_bytes()
    assert not set(content) - set(range(0x20, 0x7F)) - {ord("\n")}
    assert rb"\u" not in content


def test_no_text_holds_control_characters_or_template_marks() -> None:
    for pair in TRAIN + TEST:
        text = "\n".join([prompt_text(pair), pair.chosen, pair.rejected])
        assert text.replace("\n", "").isprintable()
        assert not re.search(r"<\||</?s>|Human:|Assistant:", text)


def test_bad_words_are_rare_and_rarer_in_chosen_answers() -> None:
    bad = bad_word_pattern(None)
    chosen = sum(bad.search(pair.chosen) is not None for pair in TRAIN + TEST)
    rejected = sum(bad.search(pair.rejected) is not None for pair in TRAIN + TEST)
    assert chosen < rejected < 0.05 * len(TRAIN + TEST)
    assert chosen < 0.01 * len(TRAIN + TEST)


def test_no_prompt_comes_twice() -> None:
    seen = Counter(" ".join(words(prompt_text(pair))) for pair in TRAIN + TEST)
    assert [text for text, count in seen.items() if count > 1] == []


def test_no_answer_comes_twice() -> None:
    seen = Counter(answer for pair in TRAIN + TEST for answer in (pair.chosen, pair.rejected))
    assert [text for text, count in seen.items() if count > 1] == []


def test_no_held_out_topic_occurs_in_a_training_prompt() -> None:
    topics = {word for topic in column(TEST, "topic") for word in words(topic)}
    forms = topics | {f"{word}s" for word in topics}
    asked = {word for pair in TRAIN for word in words(prompt_text(pair))}
    assert forms & asked == set()
    assert topics & {word for topic in column(TRAIN, "topic") for word in words(topic)} == set()


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_both_kinds_are_there_and_a_fifth_has_several_turns(pairs: list[PreferencePair]) -> None:
    kinds = Counter(column(pairs, "kind"))
    assert set(kinds) == {"helpful", "harmless"}
    assert min(kinds.values()) >= len(pairs) / 5
    assert sum(len(pair.prompt) > 1 for pair in pairs) >= len(pairs) / 5


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_every_pair_differs_for_a_named_reason(pairs: list[PreferencePair]) -> None:
    flaws = Counter(column(pairs, "flaw"))
    assert len(flaws) >= 3
    assert max(flaws.values()) < 0.65 * len(pairs)


# Rules of thumb


def accuracy(pairs: Sequence[PreferencePair], margin: Callable[[PreferencePair], float]) -> float:
    """Return how often `margin` is above 0; a tie counts half."""
    margins = [margin(pair) for pair in pairs]
    return sum(0.5 if m == 0 else float(m > 0) for m in margins) / len(margins)


def naive_bayes(pairs: Sequence[PreferencePair], first: int) -> Callable[[PreferencePair], float]:
    """Return the log odds of chosen over rejected by the first words of each answer, learnt from `pairs`."""
    good = Counter(word for pair in pairs for word in words(pair.chosen)[:first])
    bad = Counter(word for pair in pairs for word in words(pair.rejected)[:first])
    size = len(good.keys() | bad.keys())

    def odds(answer: str) -> float:
        return sum(
            math.log((good[w] + 1) / (good.total() + size)) - math.log((bad[w] + 1) / (bad.total() + size))
            for w in words(answer)[:first]
        )

    return lambda pair: odds(pair.chosen) - odds(pair.rejected)


def test_the_rule_that_is_measured_here_does_learn() -> None:
    """Otherwise the limits below would say nothing."""
    planted = [PreferencePair((("user", str(i)),), f"Sure {i}", f"Well {i}") for i in range(50)]
    assert accuracy(planted[:10], naive_bayes(planted[10:], 1)) == 1.0


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
@pytest.mark.parametrize("kind", ["helpful", "harmless", None])
def test_length_alone_tells_nothing(pairs: list[PreferencePair], kind: str | None) -> None:
    pairs = [pair for pair in pairs if kind in (None, dict(pair.columns)["kind"])]
    longer = accuracy(pairs, lambda pair: len(pair.chosen) - len(pair.rejected))
    assert 1 - CHANCE_LIMIT < longer < CHANCE_LIMIT


@pytest.mark.parametrize("first", [1, 3, 5])
def test_first_words_tell_little_about_held_out_pairs(first: int) -> None:
    assert accuracy(TEST, naive_bayes(TRAIN, first)) < CHANCE_LIMIT


@pytest.mark.parametrize("first", [1, 3, 5])
def test_first_words_tell_little_in_cross_validation(first: int) -> None:
    folds = [
        accuracy(TRAIN[fold::5], naive_bayes([p for i, p in enumerate(TRAIN) if i % 5 != fold], first))
        for fold in range(5)
    ]
    assert sum(folds) / len(folds) < CHANCE_LIMIT
