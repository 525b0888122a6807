"""A conversation with all arms at once: what was asked, what each answered, and its form on disk and on paper."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_rlhf.chat.comparison import Answer
from lora_rlhf.chat.mixed_decoding import ChatSampling
from lora_rlhf.chat.prompts import MOST_CHARACTERS, clean_text
from lora_rlhf.data.chat import Message
from lora_rlhf.errors import UserError

MOST_IN_HISTORY = 500_000
"""Characters of a history that comes through the API, and a thousandth of it messages."""


@dataclass
class Turn:
    """One message and the arms' answers to it.

    Attributes:
        message: of the user, cleaned.
        system: the system prompt it was asked under; empty: none.
        sampling: how the answers were sampled.
        answers: by arm.
        kl: of Plus to base on its answer, in nats, once it was asked for.
    """

    message: str
    system: str
    sampling: ChatSampling
    answers: dict[str, Answer] = field(default_factory=dict)
    kl: float | None = None


@dataclass
class Conversation:
    """Turns, and which arm stands in which column.

    Attributes:
        turns: oldest first.
        order: arms, by column from the left.
        blind: whether the columns' names are hidden until a vote.
        voted: the arm that was voted best, or "tie"; none: no vote yet.
    """

    order: list[str]
    turns: list[Turn] = field(default_factory=list)
    blind: bool = False
    voted: str | None = None

    @property
    def names_are_hidden(self) -> bool:
        """Whether a column may not tell which arm it is."""
        return self.blind and self.voted is None

    def messages(self, arm: str) -> list[Message]:
        """Return what `arm` goes on from: its own history, and the last message."""
        last = self.turns[-1]
        found: list[Message] = [{"role": "system", "content": last.system}] if last.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.message})
            if turn is not last:
                found.append({"role": "assistant", "content": turn.answers[arm].text if arm in turn.answers else ""})
        return found


def checked_text(text: Any, what: str, may_be_empty: bool = False) -> str:
    """Return a message or system prompt, cleaned.

    Raises:
        UserError: it is no text, empty, or too long.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} is text, not {type(text).__name__}")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{what} is too long: {len(text):,} characters where {MOST_CHARACTERS:,} are read; shorten it")
    cleaned = clean_text(text).strip()
    if not cleaned and not may_be_empty:
        raise UserError(f"{what} is empty; write something first")
    return cleaned


def checked_history(history: Any) -> list[Message]:
    """Return earlier rounds as messages, cleaned.

    Raises:
        UserError: not a list of user and assistant messages in turns, beginning with the user's.
    """
    if not isinstance(history, list):
        raise UserError(f"history is a list of messages, not {type(history).__name__}")
    held = [message.get("content") for message in history if isinstance(message, Mapping)]
    length = sum(len(content) for content in held if isinstance(content, str))
    if length > MOST_IN_HISTORY or len(history) > MOST_IN_HISTORY // 1000:
        raise UserError(
            f"history is too long ({len(history):,} messages, {length:,} characters): {MOST_IN_HISTORY // 1000:,} and "
            f"{MOST_IN_HISTORY:,} are read; leave the oldest out"
        )
    found: list[Message] = []
    for i, message in enumerate(history):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, Mapping) or message.get("role") != role or "content" not in message:
            raise UserError(f'history[{i}] is {{"role": "{role}", "content": text}}: user and assistant take turns')
        found.append({"role": role, "content": checked_text(message["content"], f"history[{i}].content", True)})
    if len(found) % 2:
        raise UserError("history ends with an answer of the assistant; the new message comes after it")
    return found


def conversation_record(conversation: Conversation, names: Mapping[str, str], unit: str | None) -> dict[str, Any]:
    """Return the conversation for an export; `names` says how each arm is called there."""
    return {
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "blind": conversation.blind,
        "vote": names.get(conversation.voted or "", conversation.voted),
        "turns": [
            {
                "message": turn.message,
                "system": turn.system,
                "sampling": asdict(turn.sampling),
                "kl_of_plus": None if conversation.names_are_hidden else turn.kl,
                "answers": {
                    names[arm]: {"text": turn.answers[arm].text}
                    | ({} if conversation.names_are_hidden else figures(turn.answers[arm], unit))
                    for arm in conversation.order
                    if arm in turn.answers
                },
            }
            for turn in conversation.turns
        ],
    }


def figures(answer: Answer, unit: str | None) -> dict[str, Any]:
    """Return an answer's figures as they are exported."""
    return {
        "score": answer.score,
        "score_unit": unit,
        "tokens": answer.tokens,
        "tokens_per_second": round(answer.tokens_per_second, 1),
        "ended": answer.ended,
        "stopped": answer.stopped,
        "bad_words": answer.bad_words,
        "left_out_rounds": answer.left_out,
    }


def conversation_markdown(record: Mapping[str, Any]) -> str:
    """Return an exported conversation as Markdown; texts are fenced, so that nothing in them is markup."""
    lines = [f"# Conversation of {record['exported']}", ""]
    if record["vote"]:
        lines += [f"Voted best: {record['vote']}", ""]
    for i, turn in enumerate(record["turns"], 1):
        settings = ", ".join(f"{name} {value}" for name, value in turn["sampling"].items())
        lines += [f"## {i}. User", "", *_fenced(turn["message"]), "", settings, ""]
        if turn["system"]:
            lines += ["System prompt:", "", *_fenced(turn["system"]), ""]
        for name, answer in turn["answers"].items():
            lines += [f"### {name}", "", *_fenced(answer["text"]), ""]
            if "tokens" in answer:
                lines += [figures_line(answer), ""]
        if turn["kl_of_plus"] is not None:
            lines += [f"KL of Plus to base on its answer: {turn['kl_of_plus']:.2f} nats", ""]
    return "\n".join(lines)


def figures_line(answer: Mapping[str, Any]) -> str:
    """Return an answer's figures in words."""
    parts = [] if answer["score"] is None else [f"reward {answer['score']:+.2f} ({answer['score_unit']})"]
    parts += [f"{answer['tokens']} tokens", f"{answer['tokens_per_second']:.1f} tokens/s"]
    parts.append("stopped" if answer["stopped"] else "ended by itself" if answer["ended"] else "cut at max tokens")
    if answer["bad_words"]:
        parts.append("bad words: " + ", ".join(answer["bad_words"]))
    if answer["left_out_rounds"]:
        parts.append(f"too long to show it all: the oldest {answer['left_out_rounds']} rounds were left out")
    return " · ".join(parts)


def _fenced(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def restored_conversation(data: Any, arms: Sequence[str]) -> Conversation | None:
    """Return a conversation that a browser kept (`asdict` of it), or none where it is no conversation of these arms."""
    try:
        turns = [
            Turn(
                checked_text(turn["message"], "message"),
                checked_text(turn["system"], "system prompt", True),
                ChatSampling(**turn["sampling"]).checked(10**9),
                {name: _restored_answer(turn["answers"][name]) for name in arms if name in turn["answers"]},
                None if turn["kl"] is None else float(turn["kl"]),
            )
            for turn in data["turns"]
        ]
        if sorted(data["order"]) != sorted(arms) or data["voted"] not in (None, "tie", *arms):
            return None
        if data["blind"] and data["voted"] is None:  # browsers keep none of these: it could be voted on
            return None
        return Conversation(list(data["order"]), turns, bool(data["blind"]), data["voted"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _restored_answer(held: Mapping[str, Any]) -> Answer:
    return Answer(
        text=checked_text(held["text"], "answer", True),
        tokens=int(held["tokens"]),
        seconds=float(held["seconds"]),
        ended=bool(held["ended"]),
        end_token=None if held.get("end_token") is None else int(held["end_token"]),
        stopped=bool(held["stopped"]),
        finished=True,
        left_out=int(held["left_out"]),
        score=None if held["score"] is None else float(held["score"]),
        bad_words=[str(word) for word in held["bad_words"]],
    )
