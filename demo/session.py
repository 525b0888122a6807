"""What a visitor's clicks do to their conversation; each function takes and returns plain values, no components."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.chat.conversation import (
    Conversation,
    Turn,
    checked_history,
    checked_text,
    conversation_record,
    figures,
)
from lora_rlhf.chat.mixed_decoding import ChatSampling
from lora_rlhf.chat.votes import TIE, append_vote, kept_votes, ties, win_rates
from lora_rlhf.data.chat import Message
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import TITLES

COLUMN_NAMES = "ABC"
"""What columns are called as long as their arms are hidden."""


class ChatSessions:
    """The conversations of all visitors with one comparison.

    Args:
        comparison: the arms.
        votes_file: where blind votes are kept.
    """

    def __init__(self, comparison: ChatComparison, votes_file: Path) -> None:
        self.comparison, self.votes_file = comparison, votes_file
        self._stops: dict[str, threading.Event] = {}  # of visitors who wait for answers
        self._begun: set[str] = set()  # those of them who are being answered
        self._voting = threading.Lock()

    @property
    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of each arm: votes count for these very models."""
        return {name: arm.fingerprint for name, arm in self.comparison.arms.items()}

    def new_conversation(self, blind: bool = False) -> Conversation:
        """Return an empty conversation; a blind one has its columns shuffled."""
        order = list(self.comparison.arms)
        if blind:
            random.SystemRandom().shuffle(order)
        return Conversation(order, blind=blind)

    def names(self, conversation: Conversation) -> dict[str, str]:
        """Return what each arm may be called now."""
        if conversation.names_are_hidden:
            return dict(zip(conversation.order, COLUMN_NAMES, strict=False))
        return {name: TITLES[name] for name in conversation.order}

    # -- asking -------------------------------------------------------------------------------------------------------

    def asked(self, visitor: str, conversation: Conversation, message: Any, system: Any, *sampling: Any) -> None:
        """Add a turn without answers yet; `sampling`: temperature, top_p, max_tokens, seed.

        Raises:
            UserError: a value is out of range, the message is empty or too long, or answers are still on their way;
                the conversation is as it was.
        """
        self._refuse_if_waiting(visitor)
        checked = ChatSampling(*sampling).checked(self.comparison.most_tokens)
        turn = Turn(checked_text(message, "the message"), checked_text(system, "the system prompt", True), checked)
        conversation.turns.append(turn)
        self._stops[visitor] = threading.Event()

    def asked_again(self, visitor: str, conversation: Conversation, *sampling: Any) -> None:
        """Take the last answers back and ask the same again with these settings.

        Raises:
            UserError: nothing was asked yet, a value is out of range, or answers are still on their way.
        """
        self._refuse_if_waiting(visitor)
        if not conversation.turns:
            raise UserError("there is no message to ask again; write one first")
        last = conversation.turns[-1]
        checked = ChatSampling(*sampling).checked(self.comparison.most_tokens)
        conversation.turns[-1] = Turn(last.message, last.system, checked)
        self._stops[visitor] = threading.Event()

    def has_asked(self, visitor: str) -> bool:
        """Return whether the visitor's last message waits for answers."""
        return visitor in self._stops

    def _refuse_if_waiting(self, visitor: str) -> None:
        if self.has_asked(visitor):
            raise UserError("answers are still on their way; wait for them, or press Stop first")

    def answering(self, visitor: str, conversation: Conversation) -> Iterator[None]:
        """Fill in the last turn's answers; comes back after every token, and after the scores.

        Raises:
            UserError: the message does not fit; its turn is taken out.
        """
        turn = conversation.turns[-1]
        asked = {arm: conversation.messages(arm) for arm in conversation.order}
        stop = self._stops[visitor]
        self._begun.add(visitor)
        try:
            for answers in self.comparison.answers(asked, turn.sampling, stop):
                turn.answers = answers
                yield
        except UserError:
            conversation.turns.pop()
            raise
        finally:
            self._stops.pop(visitor, None)
            self._begun.discard(visitor)

    def stop(self, visitor: str, conversation: Conversation) -> str | None:
        """End the visitor's answers at the next token; a message that still waits is taken back and returned."""
        if visitor in self._begun:
            self._stops[visitor].set()
        elif visitor in self._stops:
            del self._stops[visitor]
            return conversation.turns.pop().message
        return None

    def measure_kl(self, conversation: Conversation) -> None:
        """Put the KL of Plus to base on the last answer into its turn.

        Raises:
            UserError: there is no answer of Plus, or no KL.
        """
        if conversation.names_are_hidden:
            raise UserError("the KL would tell which column is Plus; vote first")
        if not conversation.turns or "plus" not in conversation.turns[-1].answers:
            raise UserError("there is no answer of Plus yet; ask something first")
        turn = conversation.turns[-1]
        answer = turn.answers["plus"]
        turn.kl = self.comparison.kl_of_plus(conversation.messages("plus"), answer.text, answer.ended)

    # -- votes --------------------------------------------------------------------------------------------------------

    def vote(self, conversation: Conversation, column: int | None) -> None:
        """Keep a vote for a column (none: no difference), on disk before the names are shown.

        Raises:
            UserError: there is nothing to vote on, it was voted on before, or the vote cannot be written.
        """
        if not conversation.names_are_hidden:
            raise UserError("a vote is for blind comparisons, and one each: clear the conversation to begin another")
        if not any(turn.answers for turn in conversation.turns):
            raise UserError("there are no answers to vote on yet")
        winner = TIE if column is None else conversation.order[column]
        hidden = conversation_record(conversation, {arm: arm for arm in conversation.order}, None)
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": uuid.uuid4().hex,
            "winner": winner,
            "columns": conversation.order,
            "arms": self.fingerprints,
            "turns": hidden["turns"],
        }
        with self._voting:
            append_vote(self.votes_file, record)
        conversation.voted = winner

    def vote_table(self) -> tuple[list[dict[str, Any]], int]:
        """Return (a row per arm: wins, share, interval; number of votes without a winner)."""
        votes = kept_votes(self.votes_file)
        return win_rates(votes, self.fingerprints), ties(votes, self.fingerprints)

    # -- the API ------------------------------------------------------------------------------------------------------

    def compared(
        self, message: Any, history: Any, system: Any, max_tokens: Any, temperature: Any, top_p: Any, seed: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield every arm's answer and figures, after every token; the last one is whole.

        Raises:
            UserError: a value is out of range, or the message does not fit.
        """
        sampling = ChatSampling(temperature, top_p, max_tokens, seed).checked(self.comparison.most_tokens)
        system_text = checked_text(system, "system_prompt", True)
        told: list[Message] = [{"role": "system", "content": system_text}] if system_text else []
        told += [*checked_history(history), {"role": "user", "content": checked_text(message, "message")}]
        unit = self.comparison.score_unit
        for answers in self.comparison.answers({arm: told for arm in self.comparison.arms}, sampling):
            finished = all(answer.finished for answer in answers.values())
            found = {name: {"text": answer.text, **figures(answer, unit)} for name, answer in answers.items()}
            yield {"finished": finished, "answers": found}
