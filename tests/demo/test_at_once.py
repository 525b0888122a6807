"""Clicks that come while something else is under way, and visitors that come together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_rlhf_demo.page import words_for_failure
from lora_rlhf_demo.session import ChatSessions
from served_page import Served, eventually
from visitor import Visitor, playwright

from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.errors import UserError

SAMPLING = (0.7, 1.0, 8, 0)


@pytest.fixture
def sessions(demo_comparison: ChatComparison, tmp_path: Path) -> ChatSessions:
    return ChatSessions(demo_comparison, tmp_path / "votes.jsonl", most_waiting=2)


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_nothing_changes_a_conversation_that_is_being_answered(sessions: ChatSessions) -> None:
    conversation = sessions.new_conversation()
    sessions.asked("me", conversation, "One?", "", *SAMPLING)
    for _ in sessions.answering("me"):
        pass
    sessions.asked("me", conversation, "Two?", "", *SAMPLING)
    answering = sessions.answering("me")
    next(answering)
    for change in (
        lambda: sessions.asked("me", conversation, "Three?", "", *SAMPLING),
        lambda: sessions.asked_again("me", conversation, *SAMPLING),
        lambda: sessions.measure_kl("me", conversation),
        lambda: sessions.vote("me", conversation, 0),
        lambda: sessions.refuse_if_waiting("me"),
    ):
        with pytest.raises(UserError, match="still on their way"):
            change()
    assert [turn.message for turn in conversation.turns] == ["One?", "Two?"]
    for _ in answering:
        pass
    assert not sessions.has_asked("me") and all(a.finished for a in conversation.turns[1].answers.values())


def test_a_message_that_waits_can_be_taken_back(sessions: ChatSessions) -> None:
    conversation = sessions.new_conversation()
    sessions.asked("me", conversation, "One?", "", *SAMPLING)
    assert sessions.stop("me") == "One?" and conversation.turns == []
    assert not sessions.has_asked("me") and sessions.stop("me") is None


def test_asking_again_keeps_the_answers_until_there_are_others(sessions: ChatSessions) -> None:
    conversation = sessions.new_conversation()
    sessions.asked("me", conversation, "One?", "", *SAMPLING)
    for _ in sessions.answering("me"):
        pass
    before = conversation.turns[0]
    sessions.asked_again("me", conversation, *SAMPLING)
    sessions.stop("me")
    assert conversation.turns == [before] and before.answers["plus"].finished


def test_a_queue_that_is_full_is_said_in_words(sessions: ChatSessions) -> None:
    for name in ("one", "two"):
        sessions.asked(name, sessions.new_conversation(), "hello", "", *SAMPLING)
    late = sessions.new_conversation()
    with pytest.raises(UserError, match="2 messages are waiting, which is as many as may"):
        sessions.asked("three", late, "hello", "", *SAMPLING)
    assert late.turns == []
    sessions.leave("one")
    sessions.asked("three", late, "hello", "", *SAMPLING)


def test_many_clicks_are_one_vote(sessions: ChatSessions) -> None:
    conversation = sessions.new_conversation(blind=True)
    sessions.asked("me", conversation, "hello", "", *SAMPLING)
    for _ in sessions.answering("me"):
        pass
    refused: list[UserError] = []

    def vote() -> None:
        try:
            sessions.vote("me", conversation, 1)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and len(sessions.votes_file.read_text().splitlines()) == 1
    assert sum(row["wins"] for row in sessions.vote_table()[0]) == 1


def test_an_answer_that_cannot_be_scored_stays(sessions: ChatSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text may have more tokens than it was sampled in, and so be too long for the reward."""
    real = ChatComparison._score

    def tight(self: ChatComparison, conversations: Any, answers: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(self, "context", 8)
            real(self, conversations, answers)

    monkeypatch.setattr(ChatComparison, "_score", tight)
    conversation = sessions.new_conversation()
    sessions.asked("me", conversation, "How do I keep basil alive?", "", *SAMPLING)
    for _ in sessions.answering("me"):
        pass
    assert all(a.finished and a.tokens and a.score is None for a in conversation.turns[0].answers.values())


# -- the page ---------------------------------------------------------------------------------------------------------


def test_clicks_while_answers_stream_are_refused_or_impossible(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    with served.held():
        visitor.ask("How do I keep basil alive?", settle=False)
        assert eventually(lambda: served.comparison.under_way == 1)
        for name in ("send", "retry", "undo", "clear", "kl"):
            playwright.expect(visitor.tab.locator(f"#{name}")).to_be_disabled()
        visitor.tab.fill("#message textarea", "And mint?")
        visitor.tab.press("#message textarea", "Enter")
        visitor.wait_for("still on their way")
        playwright.expect(visitor.tab.locator("#stop")).to_be_enabled()
    visitor.wait_for("All answers are there")
    assert visitor.texts("user") == [["How do I keep basil alive?"]] * 3
    assert visitor.tab.input_value("#message textarea") == "And mint?"
    visitor.ask("And thyme?")


def test_clear_and_undo_right_behind_send(visit: Callable[..., Visitor]) -> None:
    """The server sees them before the page has greyed them out."""
    visitor = visit()
    visitor.ask("One?")
    for name in ("clear", "undo"):
        visitor.tab.fill("#message textarea", "Two?")
        visitor.tab.evaluate(
            "(name) => { document.querySelector('#send').click(); document.querySelector('#' + name).click(); }", name
        )
        assert eventually(
            lambda: visitor.tab.locator("#send").is_enabled() and visitor.tab.locator("#stop").is_disabled()
        )
        visitor.tab.wait_for_timeout(300)
        visitor.click("clear")
        visitor.wait_for("Ready")
        visitor.ask("Still alive?")
        visitor.click("clear")
        visitor.wait_for("Ready")


def test_an_error_of_the_model_leaves_the_page_usable(
    visit: Callable[..., Visitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = visit()
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise RuntimeError("CUDA: secret details of this machine")

        patch.setattr(ChatComparison, "_score", fails)
        visitor.ask("How do I keep basil alive?", settle=False)
        visitor.wait_for("Something went wrong here")
        assert "secret" not in visitor.tab.content()
    visitor.ask("And mint?")


def test_what_a_visitor_is_told_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words_for_failure(RuntimeError("secret")).startswith("Something went wrong here")
    full = torch.AcceleratorError("CUDA error: out of memory")
    assert words_for_failure(full).startswith("Memory ran out over this")
    monkeypatch.setattr("lora_rlhf_demo.page.device_answers", lambda: False)
    assert "has to start it again" in words_for_failure(full)


def test_tabs_keep_their_own_conversations(visit: Callable[..., Visitor], served: Served) -> None:
    one = visit()
    one.ask("One?")
    other = Visitor(one.tab.context.new_page()).open(served.url)
    assert other.texts() == [[], [], []]
    other.ask("Other?")
    one.open(served.url)
    assert eventually(lambda: one.texts("user") == [["One?"]] * 3)


def test_a_question_survives_a_reload_without_its_answers(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    with served.held():
        visitor.ask("How do I keep basil alive?", settle=False)
        assert eventually(lambda: served.comparison.under_way == 1)
        visitor.open(served.url)
    assert eventually(lambda: visitor.texts() == [["(no answer)"]] * 3)
    visitor.click("retry")
    visitor.wait_for("All answers are there")
    assert visitor.texts() != [["(no answer)"]] * 3


def test_a_tab_that_is_closed_while_it_waits_is_forgotten(
    visit: Callable[..., Visitor], serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(tmp_path / "votes.jsonl", waiting=2)
    one, other = visit(url=served.url), visit(url=served.url)
    with served.held():
        one.ask("One?", settle=False)
        assert eventually(lambda: served.comparison.under_way == 1)
        other.ask("Two?", settle=False)
        other.wait_for("Waiting for the models")
        late = visit(url=served.url)
        late.ask("Three?", settle=False)
        late.wait_for("2 messages are waiting, which is as many as may")
        assert late.texts("user") == [[]] * 3
        other.tab.close()
        one.tab.close()
    assert served.waits_until_idle()
    late.ask("Now?")


def test_a_queue_that_the_api_has_filled_gives_the_message_back(
    visit: Callable[..., Visitor], serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(tmp_path / "votes.jsonl", waiting=1)
    visitor = visit(url=served.url)
    from test_api import joined, listening

    with served.held():
        joined(served, "first")
        with listening(served, "first", b"process_starts"):
            joined(served, "second")
            with listening(served, "second", b"estimation"):
                visitor.ask("Is there room?", settle=False)
                visitor.wait_for("taken back")
                assert visitor.tab.input_value("#message textarea") == "Is there room?"
    assert served.waits_until_idle()
    assert json.dumps(visitor.texts("user")) == "[[], [], []]"
