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
CHANCE_LIMIT = 0.6
HEDGES = re.compile(r"\b(maybe|perhaps|might|may|could|probably|possibly|seems?|likely)\b", re.IGNORECASE)
FIRST_PERSON = re.compile(r"\b(I|I'm|I'd|I'll|I've|me|my)\b")
SECOND_PERSON = re.compile(r"\b(you|your|you're|yours)\b", re.IGNORECASE)


def of_kinds(pairs: Sequence[PreferencePair], *kinds: str) -> list[PreferencePair]:
    return [pair for pair in pairs if dict(pair.columns)["kind"] in kinds]


def sets_of_pairs(pairs: list[PreferencePair]) -> dict[str, list[PreferencePair]]:
    """The sets on which no rule may work that does not read the prompt: all, and the parts that balance themselves."""
    quality = [pair for pair in of_kinds(pairs, "helpful") if dict(pair.columns)["flaw"] != "refuses"]
    return {"all": pairs, "quality": quality, "declining": [pair for pair in pairs if pair not in quality]}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def column(pairs: Iterable[PreferencePair], name: str) -> list[str]:
    return [dict(pair.columns)[name] for pair in pairs]


def prompt_text(pair: PreferencePair) -> str:
    return "\n".join(content for _, content in pair.prompt)


def test_there_are_enough_pairs() -> None:
    assert len(TRAIN) >= 1200
    assert len({pair.prompt for pair in TEST}) >= 100
    assert len(of_kinds(TRAIN, "harmless", "look-alike")) >= len(TRAIN) / 2
    assert len(of_kinds(TRAIN, "look-alike")) >= 0.6 * len(of_kinds(TRAIN, "harmless"))


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
    assert chosen < 0.015 * len(TRAIN + TEST)


def test_no_prompt_is_in_both_splits_and_none_is_asked_often() -> None:
    train, test = (Counter(" ".join(words(prompt_text(pair))) for pair in pairs) for pairs in (TRAIN, TEST))
    assert train.keys() & test.keys() == set()
    assert max((train + test).values()) <= 3  # a harmful prompt has a fluent, a willing and a rude answer to reject


def test_no_answer_is_chosen_twice_or_rejected_twice() -> None:
    """But declines are chosen against two answers to a harmful prompt, and help against a bad answer and a refusal."""
    pairs = TRAIN + TEST
    chosen, rejected = (Counter(getattr(pair, side) for pair in pairs) for side in ("chosen", "rejected"))
    assert max(rejected.values()) == 1 and max(chosen.values()) == 2
    again = {pair.chosen for pair in pairs if chosen[pair.chosen] == 2}
    help_twice = {pair.chosen for pair in of_kinds(pairs, "helpful") if dict(pair.columns)["flaw"] == "refuses"}
    assert again - help_twice <= rejected.keys()


def test_no_held_out_topic_occurs_in_a_training_prompt() -> None:
    topics = {word for topic in column(TEST, "topic") for word in words(topic)}
    forms = topics | {f"{word}s" for word in topics}
    asked = {word for pair in TRAIN for word in words(prompt_text(pair))}
    assert forms & asked == set()
    assert topics & {word for topic in column(TRAIN, "topic") for word in words(topic)} == set()


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_all_kinds_are_there_and_a_sixth_has_several_turns(pairs: list[PreferencePair]) -> None:
    kinds = Counter(column(pairs, "kind"))
    assert set(kinds) == {"helpful", "harmless", "look-alike"}
    assert min(kinds.values()) >= len(pairs) / 8
    assert sum(len(pair.prompt) > 1 for pair in pairs) >= len(pairs) / 6


def test_the_rejected_answers_to_harmful_prompts_comply_preach_or_insult() -> None:
    flaws = Counter(column(of_kinds(TRAIN + TEST, "harmless"), "flaw"))
    assert {"complies", "preachy", "rude"} <= set(flaws) and flaws["complies"] >= flaws.total() / 2
    assert set(column(of_kinds(TRAIN + TEST, "look-alike"), "flaw")) == {"refuses"}


@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_whoever_does_not_read_the_prompt_is_right_on_half_of_the_crossed_pairs(pairs: list[PreferencePair]) -> None:
    """The same two answers stand under a harmful prompt and under its look-alike, the other way round."""
    sides = {(pair.chosen, pair.rejected) for pair in of_kinds(pairs, "harmless", "look-alike")}
    crossed = [one for one in sides if one[::-1] in sides]
    assert len(crossed) >= 0.3 * len(sides)
    alike = [pair for pair in of_kinds(pairs, "harmless", "look-alike") if (pair.chosen, pair.rejected) in set(crossed)]
    for rule in (len, lambda answer: -len(set(answer)), hash):
        assert accuracy(alike, lambda pair, rule=rule: rule(pair.chosen) - rule(pair.rejected)) == 0.5


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


RULES: dict[str, Callable[[str], float]] = {
    "length": len,
    "words": lambda answer: len(words(answer)),
    "sentences": lambda answer: len(re.findall(r"[.!?](?:\s|$)", answer)),
    "question marks": lambda answer: answer.count("?"),
    "commas": lambda answer: answer.count(","),
    "semicolons and colons": lambda answer: answer.count(";") + answer.count(":"),
    "hedges": lambda answer: len(HEDGES.findall(answer)),
    "first person": lambda answer: len(FIRST_PERSON.findall(answer)),
    "second person": lambda answer: len(SECOND_PERSON.findall(answer)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("part", ["all", "quality", "declining"])
@pytest.mark.parametrize("pairs", [TRAIN, TEST], ids=["train", "test"])
def test_no_rule_of_thumb_tells_the_better_answer(pairs: list[PreferencePair], part: str, rule: str) -> None:
    found = accuracy(sets_of_pairs(pairs)[part], lambda pair: RULES[rule](pair.chosen) - RULES[rule](pair.rejected))
    assert 1 - CHANCE_LIMIT < found < CHANCE_LIMIT


@pytest.mark.parametrize("part", ["all", "quality", "declining"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_first_words_tell_little_about_held_out_pairs(first: int, part: str) -> None:
    assert accuracy(sets_of_pairs(TEST)[part], naive_bayes(TRAIN, first)) < CHANCE_LIMIT


@pytest.mark.parametrize("part", ["all", "quality", "declining"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_first_words_tell_little_in_cross_validation(first: int, part: str) -> None:
    """Folds are of topics: the twin of a pair is in its fold."""
    pairs = sets_of_pairs(TRAIN)[part]
    place = {topic: i for i, topic in enumerate(dict.fromkeys(column(pairs, "topic")))}
    of_fold = [[p for p in pairs if place[dict(p.columns)["topic"]] % 5 == fold] for fold in range(5)]
    folds = [
        accuracy(of_fold[fold], naive_bayes([p for i in range(5) if i != fold for p in of_fold[i]], first))
        for fold in range(5)
    ]
    assert sum(folds) / len(folds) < CHANCE_LIMIT
