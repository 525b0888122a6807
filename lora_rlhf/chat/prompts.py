"""Typed text on its way to a prompt: cleaned, robbed of the power to open a turn, and cut to what a model can read."""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lora_rlhf.data.chat import Message, answer_ids
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arms import prompts_of_any_template

MOST_CHARACTERS = 32_000
"""Of a message or a system prompt; longer ones are refused before they are tokenised."""
MOST_CHARACTERS_PER_TOKEN = 16
"""Of a long dialogue; what is beyond that is taken not to fit without being tokenised."""
_PROBE = "\N{REFERENCE MARK}"


def clean_text(text: str) -> str:
    """Return `text` with plain line ends, without other control characters but tab; surrogates become U+FFFD."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return "" if kind == "Cc" and character not in "\n\t" else character


def turn_markers(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the strings by which a model's template opens and closes turns.

    They are the added tokens of the vocabulary, and what the template itself writes around contents ("Human:",
    "[INST]"). A word that stands behind a special token ("user" in ChatML) opens nothing alone and is not among them.
    """
    special = {token for token in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens) if token.strip()}
    written = re.split("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)", _written(tokenizer))
    pieces = {word for part in written for piece in part.split(_PROBE) for word in piece.split()}
    marks = special | {word for word in pieces if re.search(r"[<>\[\]{}|#]|:$", word)}
    found = [mark for mark in marks if len(mark) > 1]
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def _written(tokenizer: Any) -> str:
    """Return two rounds of a dialogue as the template writes it, every content a probe."""
    rounds = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
    for messages in ([{"role": "system", "content": _PROBE}, *rounds], rounds, rounds[-1:]):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # whatever a template raises: a plainer dialogue
            continue
    return ""


def harmless_text(text: str, markers: re.Pattern[str]) -> str:
    """Return `text` with a space after the first character of every turn marker: it can be read, but opens no turn."""
    return markers.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def harmless_answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Return the ids of an answer as they follow a prompt, then EOS; none of its text is control."""
    return answer_ids(tokenizer, harmless_text(answer, turn_markers(tokenizer)))


def fitted_prompt(tokenizer: Any, messages: Sequence[Message], room: int) -> tuple[list[int], int]:
    """Return (ids of the prompt, rounds that were left out) of a dialogue that ends with a user's message.

    Contents are data: text that looks like a turn marker is defused. Where the dialogue has more than `room` tokens,
    its oldest rounds are left out; a system prompt stays.

    Args:
        tokenizer: with its chat template.
        messages: an optional system prompt, then user and assistant in turns.
        room: tokens that the prompt may have.

    Raises:
        UserError: the last message alone is too long, or holds what the tokenizer takes for control tokens.
    """
    markers = turn_markers(tokenizer)
    told = [{**message, "content": harmless_text(message["content"], markers)} for message in messages]
    system = told[: told[0]["role"] == "system"]
    talk = told[len(system) :]
    rounds = len(talk) // 2
    lengths = itertools.accumulate(len(message["content"]) for message in reversed(talk))
    hopeless = sum(length > MOST_CHARACTERS_PER_TOKEN * room for length in lengths) // 2
    hopeless = min(hopeless, rounds)

    def without(oldest: int) -> list[int]:
        return prompts_of_any_template(tokenizer, [[*system, *talk[2 * oldest :]]])[0]

    tried = range(hopeless, rounds + 1)
    dropped = hopeless + bisect.bisect_left(tried, True, key=lambda oldest: len(without(oldest)) <= room)
    if dropped > rounds:
        raise UserError(f"the message is too long: {len(without(rounds))} tokens where {room} fit; shorten it")
    ids = without(dropped)
    plain = [{**message, "content": "x"} for message in [*system, *talk[2 * dropped :]]]
    added = tokenizer.get_added_vocab().items()
    control = {*tokenizer.all_special_ids, *(i for token, i in added if markers.fullmatch(token))}
    expected = [i for i in prompts_of_any_template(tokenizer, [plain])[0] if i in control]
    if [i for i in ids if i in control] != expected:
        raise UserError("the message holds text that this model reads as control tokens; take it out")
    return ids, dropped
