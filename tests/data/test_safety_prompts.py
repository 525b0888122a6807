"""The safety prompts: pairs that look alike, balanced answers, unlike any training pair; and other people's files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.data.preferences import PreferencePair, pair_from_row
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.data.safety_prompts import PACKAGE_FILE, SafetyPrompt, prompts_with_answers, safety_prompts
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arms import bad_word_pattern

PROMPTS = safety_prompts()
ROWS = [json.loads(line) for line in PACKAGE_FILE.read_text().splitlines()]
TRAIN = [pair_from_row(row) for row in dataset_rows("embedded", "train")]
XSTEST = Path(__file__).parents[3] / "shared" / "data" / "safety" / "xstest.jsonl"
LARGEST_OVERLAP = 0.5
"""Share of the words of two prompts, common ones apart, that both may have."""
COMMON = frozenset(
    """a an and are as at be but by can could do does for from get give had has have help her his how i if in into is it
    its just like make me my of on one or our out she should so some tell that the their them then there they this to
    up us want was we what when where which who will with without write would you your""".split()  # noqa: SIM905
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def asked(prompt: SafetyPrompt | PreferencePair) -> str:
    return "\n".join(content for role, content in prompt.prompt if role == "user")


def content_words(text: str) -> frozenset[str]:
    return frozenset(words(text)) - COMMON


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of the smaller set of words that the other has too; few words cannot be alike by chance."""
    return len(one & other) / max(4, min(len(one), len(other)))


def test_there_are_a_hundred_pairs_with_two_written_answers_of_each_kind() -> None:
    assert Counter(prompt.label for prompt in PROMPTS) == {"unsafe": len(PROMPTS) // 2, "safe": len(PROMPTS) // 2}
    assert len(PROMPTS) >= 200
    assert all(len(prompt.written) >= 2 for prompt in PROMPTS)


def test_the_two_prompts_of_a_pair_have_the_same_written_answers_and_look_alike() -> None:
    for unsafe, safe in zip(ROWS[::2], ROWS[1::2], strict=True):
        assert (unsafe["label"], safe["label"], unsafe["topic"]) == ("unsafe", "safe", safe["topic"])
        assert (unsafe["declines"], unsafe["answers"]) == (safe["declines"], safe["answers"])
    for unsafe, safe in zip(PROMPTS[: len(PROMPTS) // 2], PROMPTS[len(PROMPTS) // 2 :], strict=True):
        shared = Counter(words(asked(unsafe))) & Counter(words(asked(safe)))
        assert shared.total() >= 0.3 * min(len(words(asked(unsafe))), len(words(asked(safe)))), asked(safe)


def test_declines_and_answers_begin_alike_and_are_as_long() -> None:
    for prompt in PROMPTS:
        for decline, answer in zip(prompt.declines, prompt.answers, strict=True):
            assert words(decline)[:2] == words(answer)[:2]
            assert 0.74 <= len(words(decline)) / len(words(answer)) <= 1.34
    lengths = [[len(words(text)) for prompt in PROMPTS for text in side(prompt)] for side in
               (lambda p: p.declines, lambda p: p.answers)]  # fmt: skip
    assert abs(sum(lengths[0]) / sum(lengths[1]) - 1) < 0.05


def test_the_file_is_printable_ascii_without_bad_words() -> None:
    content = PACKAGE_FILE.read_bytes()
    assert not set(content) - set(range(0x20, 0x7F)) - {ord("\n")}
    assert rb"\u" not in content
    texts = [text for prompt in PROMPTS for text in (asked(prompt), *prompt.declines, *prompt.answers)]
    assert sum(bad_word_pattern(None).search(text) is not None for text in texts) < 0.02 * len(texts)  # "to fool", say


def test_no_topic_occurs_in_a_training_prompt() -> None:
    topics = {word for row in ROWS for word in words(row["topic"].replace("-", " "))} - {"machine"}
    forms = topics | {f"{word}s" for word in topics}
    assert forms & {word for pair in TRAIN for word in words(asked(pair))} == set()


def test_no_training_prompt_resembles_one() -> None:
    own = [(prompt, content_words(asked(prompt))) for prompt in PROMPTS]
    trained = {asked(pair): content_words(asked(pair)) for pair in TRAIN}
    alike = [
        (asked(p), text) for p, one in own for text, other in trained.items() if overlap(one, other) > LARGEST_OVERLAP
    ]
    assert alike == []


def test_no_answer_of_a_training_pair_is_among_the_written_ones() -> None:
    written = {text for prompt in PROMPTS for text in (*prompt.declines, *prompt.answers)}
    assert written & {text for pair in TRAIN for text in (pair.chosen, pair.rejected)} == set()


def test_what_resembles_is_found() -> None:
    """Otherwise the test above would say nothing."""
    one = content_words("How do I open the padlock on my neighbour's shed?")
    assert overlap(one, content_words("How can I open a padlock on a shed?")) > LARGEST_OVERLAP
    assert overlap(one, content_words("How do I open a bank account abroad?")) < LARGEST_OVERLAP


def file_with(folder: Path, *rows: Any) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


UNSAFE, SAFE = {"prompt": "May I harm?", "label": "unsafe"}, {"prompt": "May I help?", "label": "safe"}


def test_a_file_needs_no_more_than_prompt_and_label(tmp_path: Path) -> None:
    unsafe, safe = safety_prompts(file_with(tmp_path, SAFE, UNSAFE))
    assert (unsafe.label, unsafe.messages) == ("unsafe", [{"role": "user", "content": "May I harm?"}])
    assert (safe.written, safe.kind) == ([], "other")


def test_right_answers_decline_unsafe_prompts_and_answer_safe_ones(tmp_path: Path) -> None:
    written = {"declines": ["No."], "answers": ["Yes."]}
    unsafe, safe = safety_prompts(file_with(tmp_path, UNSAFE | written, SAFE | written))
    assert (unsafe.written, safe.written) == ([("No.", "Yes.")], [("Yes.", "No.")])


def test_prompts_without_written_answers_leave_those_to_the_packages_own(tmp_path: Path) -> None:
    written = {"declines": ["No."], "answers": ["Yes."]}
    whole = safety_prompts(file_with(tmp_path, UNSAFE | written, SAFE | written))
    assert prompts_with_answers(whole) == whole
    part = safety_prompts(file_with(tmp_path, UNSAFE, SAFE | written, SAFE))
    assert prompts_with_answers(part) == safety_prompts(None, 2)


def test_the_first_of_each_label_are_kept(tmp_path: Path) -> None:
    kept = safety_prompts(file_with(tmp_path, SAFE, UNSAFE, SAFE, UNSAFE, SAFE), most=1)
    assert [prompt.label for prompt in kept] == ["unsafe", "safe"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([UNSAFE, "{"], "line 2 is no JSON"),
        ([UNSAFE, "[]"], "line 2: is no JSON object"),
        ([UNSAFE, {"prompt": "x", "label": "harmful"}], "line 2: `label` is unsafe or safe, not 'harmful'"),
        ([{"label": "safe"}], "line 1: `prompt` is a text"),
        ([{"prompt": [{"role": "assistant", "content": "x"}], "label": "safe"}], "ends with the user's"),
        ([UNSAFE | {"declines": ["No."]}], "`declines` and `answers` are lists of one length"),
        ([UNSAFE | {"declines": "No.", "answers": "Yes."}], "`declines` is a list of texts"),
        ([UNSAFE], "no prompt with `label` 'safe'"),
        ([], "no prompt with `label` 'unsafe'"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_field(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape("safety_prompts: ")) as caught:
        safety_prompts(file_with(tmp_path, *rows))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"safety_prompts: .*nowhere\.jsonl cannot be read"):
        safety_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.skipif(not XSTEST.is_file(), reason="XSTest's file is not beside the repository")
def test_xstest_is_read_and_no_training_prompt_is_one_of_its_own() -> None:
    prompts = safety_prompts(XSTEST)
    assert Counter(prompt.label for prompt in prompts) == {"safe": 250, "unsafe": 200}
    asked_there = {" ".join(words(asked(prompt))) for prompt in prompts}
    assert asked_there & {" ".join(words(asked(pair))) for pair in TRAIN} == set()
