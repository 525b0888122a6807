"""Conversations: each arm's own history, exports, and what is accepted from outside."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.chat.comparison import Answer
from lora_rlhf.chat.conversation import (
    Conversation,
    Turn,
    checked_history,
    checked_text,
    conversation_markdown,
    conversation_record,
    restored_conversation,
)
from lora_rlhf.chat.mixed_decoding import ChatSampling
from lora_rlhf.errors import UserError

ARMS = ["base", "plus"]
NAMES = {"base": "base", "plus": "Plus"}


def conversation(**fields: Any) -> Conversation:
    answers = {
        "base": Answer("Water it.", 4, 2.0, ended=True, finished=True, score=-0.5),
        "plus": Answer("```\nDamn\n```", 9, 3.0, finished=True, score=1.25, bad_words=["damn"], left_out=2),
    }
    first = Turn("How do I keep basil alive?", "", ChatSampling(), answers, kl=3.5)
    return Conversation(ARMS.copy(), [first, Turn("Why?", "Be short.", ChatSampling(seed=4))], **fields)


def test_each_arm_goes_on_from_its_own_answers() -> None:
    assert conversation().messages("plus") == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How do I keep basil alive?"},
        {"role": "assistant", "content": "```\nDamn\n```"},
        {"role": "user", "content": "Why?"},
    ]
    assert conversation().messages("base")[2]["content"] == "Water it."


def test_an_export_holds_everything_and_is_json() -> None:
    record = json.loads(json.dumps(conversation_record(conversation(), NAMES, "base's sd")))
    first = record["turns"][0]
    assert first["message"] == "How do I keep basil alive?" and first["kl_of_plus"] == 3.5
    assert first["answers"]["Plus"] == {
        "text": "```\nDamn\n```", "score": 1.25, "score_unit": "base's sd", "tokens": 9, "tokens_per_second": 3.0,
        "ended": False, "stopped": False, "bad_words": ["damn"], "left_out_rounds": 2,
    }  # fmt: skip
    assert record["turns"][1]["sampling"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 256, "seed": 4}


def test_an_export_before_the_vote_tells_nothing() -> None:
    record = conversation_record(conversation(blind=True), {"base": "A", "plus": "B"}, "base's sd")
    assert record["turns"][0]["answers"] == {"A": {"text": "Water it."}, "B": {"text": "```\nDamn\n```"}}
    assert record["turns"][0]["kl_of_plus"] is None
    for told in (json.dumps(record), conversation_markdown(record)):
        assert "Plus" not in told and "reward" not in told and "1.25" not in told


def test_markdown_fences_what_was_said() -> None:
    text = conversation_markdown(conversation_record(conversation(voted="plus", blind=True), NAMES, "base's sd"))
    assert "Voted best: Plus" in text
    assert "### Plus\n\n````text\n```\nDamn\n```\n````\n" in text
    assert "reward +1.25 (base's sd) · 9 tokens · 3.0 tokens/s · cut at max tokens · bad words: damn" in text
    assert "the oldest 2 rounds were left out" in text and "KL of Plus to base on its answer: 3.50 nats" in text


@pytest.mark.parametrize(("blind", "voted"), [(False, None), (True, "plus"), (True, "tie")])
def test_what_a_browser_kept_comes_back(blind: bool, voted: str | None) -> None:
    kept = conversation(blind=blind, voted=voted)
    for answer in kept.turns[0].answers.values():
        answer.finished = True
    assert restored_conversation(json.loads(json.dumps(asdict(kept))), ARMS) == kept


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["base", "turns", "order"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["turns", "order", "voted", "blind", "message", "answers"]), inner, max_size=5
            )
        ),
        max_leaves=12,
    )
)
def test_anything_else_that_a_browser_sends_is_no_conversation(data: Any) -> None:
    found = restored_conversation(data, ARMS)
    assert found is None or sorted(found.order) == ARMS


def test_a_blind_round_without_vote_is_not_restored() -> None:
    """Answers that a browser invents cannot be voted on."""
    assert restored_conversation(json.loads(json.dumps(asdict(conversation(blind=True)))), ARMS) is None


@pytest.mark.parametrize("path", [("turns", 0, "message"), ("turns", 0, "sampling"), ("order",), ("voted",)])
def test_a_damaged_conversation_is_not_restored(path: tuple[Any, ...]) -> None:
    data = json.loads(json.dumps(asdict(conversation())))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 3
    assert restored_conversation(data, ARMS) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "is empty"), (" \n\t", "is empty"), ("\x00\x07", "is empty"), ("a" * 10**5, "100,000 characters where"),
     (None, "is text, not NoneType"), (["a"], "is text, not list")],
)  # fmt: skip
def test_messages_that_cannot_be_asked(text: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        checked_text(text, "the message")


def test_a_message_is_cleaned() -> None:
    assert checked_text(" a\r\nb\x00 ", "the message") == "a\nb"


@pytest.mark.parametrize(
    ("history", "what"),
    [
        ("hi", "a list of messages, not str"),
        ([{"role": "assistant", "content": "a"}], r"history\[0\] is"),
        ([{"role": "user", "content": "a"}], "ends with an answer"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], r"history\[1\] is .*assistant"),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], r"history\[0\] is"),
        ([["a", "b"]], r"history\[0\] is"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}], r"history\[0\]\.content is text"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], r"history\[0\] is"),
        ([{"role": "user", "content": "a" * 10**6}], "history is too long .1 messages, 1,000,000 characters"),
        ([{"role": "user", "content": ""}] * 1000, "history is too long .1,000 messages"),
    ],
)  # fmt: skip
def test_a_history_that_is_none_is_explained(history: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        checked_history(history)
