"""What a visitor's clicks do to their conversation; each function takes and returns plain values, no components."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class Asked:
    """A message that waits for answers, or is being answered.

    Attributes:
        conversation: whose last turn it is.
        before: the turn that it takes the place of, where the same is asked again.
        stop: ends the answers at the next token.
        begun: whether the models have begun.
    """

    conversation: Conversation
    before: Turn | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False

    def taken_back(self) -> str:
        """Take the turn out again, as if it had never been asked; return its message."""
        message = self.conversation.turns.pop().message
        if self.before is not None:
            self.conversation.turns.append(self.before)
        return message


class ChatSessions:
    """The conversations of all visitors with one comparison.

    Args:
        comparison: the arms.
        votes_file: where blind votes are kept.
        most_waiting: messages that may wait.
    """

    def __init__(self, comparison: ChatComparison, votes_file: Path, most_waiting: int = 64) -> None:
        self.comparison, self.votes_file, self.most_waiting = comparison, votes_file, most_waiting
        self._asked: dict[str, Asked] = {}
        self._voting = threading.Lock()
        self._votes = kept_votes(votes_file)

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
        self.refuse_if_waiting(visitor)
        checked = ChatSampling(*sampling).checked(self.comparison.most_tokens)
        turn = Turn(checked_text(message, "the message"), checked_text(system, "the system prompt", True), checked)
        self._refuse_if_full()
        conversation.turns.append(turn)
        self._asked[visitor] = Asked(conversation)

    def asked_again(self, visitor: str, conversation: Conversation, *sampling: Any) -> None:
        """Ask the last message again with these settings; the answers that it has stay until new ones begin.

        Raises:
            UserError: nothing was asked yet, a value is out of range, or answers are still on their way.
        """
        self.refuse_if_waiting(visitor)
        if not conversation.turns:
            raise UserError("there is no message to ask again; write one first")
        last = conversation.turns[-1]
        checked = ChatSampling(*sampling).checked(self.comparison.most_tokens)
        self._refuse_if_full()
        conversation.turns[-1] = Turn(last.message, last.system, checked)
        self._asked[visitor] = Asked(conversation, before=last)

    def has_asked(self, visitor: str) -> bool:
        """Return whether the visitor's last message waits for answers, or is being answered."""
        return visitor in self._asked

    def refuse_if_waiting(self, visitor: str) -> None:
        """Raise `UserError` where answers are on their way: the conversation must not change beneath them."""
        if self.has_asked(visitor):
            raise UserError("answers are still on their way; wait for them, or press Stop first")

    def _refuse_if_full(self) -> None:
        if len(self._asked) >= self.most_waiting:
            raise UserError(f"{len(self._asked)} messages are waiting, which is as many as may; try again in a moment")

    def answering(self, visitor: str) -> Iterator[None]:
        """Fill in the answers of what the visitor asked; comes back after every token, and after the scores.

        Raises:
            UserError: the message does not fit; it is taken back.
        """
        asked = self._asked[visitor]
        asked.begun = True
        try:
            conversation = asked.conversation
            turn = conversation.turns[-1]
            messages = {arm: conversation.messages(arm) for arm in conversation.order}
            for answers in self.comparison.answers(messages, turn.sampling, asked.stop):
                turn.answers = answers
                yield
        except UserError:
            asked.taken_back()
            raise
        finally:
            self._asked.pop(visitor, None)

    def stop(self, visitor: str) -> str | None:
        """End the visitor's answers at the next token; a message that still waits is taken back and returned."""
        asked = self._asked.get(visitor)
        if asked is not None and asked.begun:
            asked.stop.set()
        elif asked is not None:
            del self._asked[visitor]
            return asked.taken_back()
        return None

    def leave(self, visitor: str) -> None:
        """Forget a visitor who closed the page."""
        if asked := self._asked.get(visitor):
            asked.stop.set()
            if not asked.begun:
                del self._asked[visitor]

    def measure_kl(self, visitor: str, conversation: Conversation) -> float:
        """Put the KL of Plus to base on the last answer into its turn, and return it.

        Raises:
            UserError: there is no answer of Plus, or no KL, or answers are on their way.
        """
        self.refuse_if_waiting(visitor)
        if conversation.names_are_hidden:
            raise UserError("the KL would tell which column is Plus; vote first")
        if not conversation.turns or "plus" not in conversation.turns[-1].answers:
            raise UserError("there is no answer of Plus yet; ask something first")
        turn = conversation.turns[-1]
        answer = turn.answers["plus"]
        turn.kl = self.comparison.kl_of_plus(conversation.messages("plus"), answer.text, answer.end_token)
        return turn.kl

    # -- votes --------------------------------------------------------------------------------------------------------

    def vote(self, visitor: str, conversation: Conversation, column: int | None) -> None:
        """Keep a vote for a column (none: no difference), on disk before the names are shown.

        Raises:
            UserError: there is nothing to vote on, it was voted on before, or the vote cannot be written.
        """
        self.refuse_if_waiting(visitor)
        with self._voting:  # two clicks are one vote
            if not conversation.names_are_hidden:
                raise UserError("a vote is for blind comparisons, and one each: clear the conversation for another")
            if not any(turn.answers for turn in conversation.turns):
                raise UserError("there are no answers to vote on yet")
            winner = TIE if column is None else conversation.order[column]
            record = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": uuid.uuid4().hex,
                "winner": winner,
                "columns": conversation.order,
                "arms": self.fingerprints,
                "turns": conversation_record(conversation, {arm: arm for arm in conversation.order}, None)["turns"],
            }
            append_vote(self.votes_file, record)
            self._votes.append(record)
            conversation.voted = winner

    def vote_table(self) -> tuple[list[dict[str, Any]], int]:
        """Return (a row per arm: wins, share, interval; number of votes without a winner)."""
        return win_rates(self._votes, self.fingerprints), ties(self._votes, self.fingerprints)

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
        unit, found = self.comparison.score_unit, None
        for answers in self.comparison.answers({arm: told for arm in self.comparison.arms}, sampling):
            if found is not None:  # one behind: only the last one is known to be whole, scores and all
                yield {"finished": False, "answers": found}
            found = {name: {"text": answer.text, **figures(answer, unit)} for name, answer in answers.items()}
        yield {"finished": True, "answers": found}
