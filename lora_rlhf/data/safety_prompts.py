"""Prompts in pairs that look alike, one to be declined and one to be answered: the package's own, or XSTest's.

A row has `prompt` (a text, or messages that end with the user's) and `label`, which says whether a right answer
declines ("unsafe") or helps ("safe"); these are XSTest's columns (Röttger et al., NAACL 2024, arXiv 2308.01263). The
package's rows bring written answers too. `declines` and `answers` are the same texts under both prompts of a pair, each
decline about as long as the answer beside it and with the same first words: whoever does not read the prompt is right
half of the time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lora_rlhf.data.bad_rows import BadRow, check_characters
from lora_rlhf.data.chat import Message
from lora_rlhf.errors import UserError

Label = Literal["unsafe", "safe"]
LABELS: tuple[Label, ...] = get_args(Label)
PACKAGE_FILE = Path(__file__).parent / "safety" / "prompts.jsonl"
SETTING = "safety_prompts"


@dataclass(frozen=True)
class SafetyPrompt:
    """A prompt, what a right answer to it does, and written answers of both kinds.

    Attributes:
        prompt: (role, content) of each turn, the last one the user's.
        label: "unsafe": to be declined; "safe": to be answered.
        kind: what makes the pair look alike, for people; XSTest's `type`.
        declines: written answers that decline kindly; none where the file has none.
        answers: written answers that help with what was asked; each stands beside the decline of the same number.
    """

    prompt: tuple[tuple[str, str], ...]
    label: Label
    kind: str
    declines: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def written(self) -> list[tuple[str, str]]:
        """(right, wrong) written answers to this prompt."""
        sides = (self.declines, self.answers) if self.label == "unsafe" else (self.answers, self.declines)
        return list(zip(*sides, strict=True))


def safety_prompts(file: str | Path | None = None, most: int | None = None) -> list[SafetyPrompt]:
    """Return the prompts of a JSONL file; None: the package's.

    Args:
        file: one row per line.
        most: keep at most so many of each label, the first ones; None: all.

    Raises:
        UserError: the file cannot be read, or a row is not as this module says; it names the line and the field.
    """
    path = Path(file) if file else PACKAGE_FILE
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{SETTING}: {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(_safety_prompt(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{SETTING}: {path}, line {number} is no JSON: {error}") from None
            except BadRow as problem:
                raise UserError(f"{SETTING}: {path}, line {number}: {problem.detail}") from None
    kept = {label: [p for p in prompts if p.label == label][:most] for label in LABELS}
    if empty := [label for label, rows in kept.items() if not rows]:
        raise UserError(f"{SETTING}: {path} has no prompt with `label` {empty[0]!r}; both kinds are needed")
    return [prompt for label in LABELS for prompt in kept[label]]


def prompts_with_answers(prompts: list[SafetyPrompt]) -> list[SafetyPrompt]:
    """Return `prompts` where all have written answers of both kinds; else as many of the package's own."""
    if all(prompt.written for prompt in prompts):
        return prompts
    return safety_prompts(None, max(sum(prompt.label == label for prompt in prompts) for label in LABELS))


def _safety_prompt(row: Any) -> SafetyPrompt:
    if not isinstance(row, dict):
        raise BadRow("not an object", "is no JSON object with `prompt` and `label`")
    check_characters(row)
    if row.get("label") not in LABELS:
        raise BadRow("label", f"`label` is unsafe or safe, not {row.get('label')!r}")
    sides = {name: _texts(row.get(name, []), name) for name in ("declines", "answers")}
    if len(sides["declines"]) != len(sides["answers"]):
        raise BadRow("written answers", "`declines` and `answers` are lists of one length: each decline has its answer")
    return SafetyPrompt(_turns(row.get("prompt")), row["label"], str(row.get("type", "other")), **sides)


def _turns(prompt: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str) and prompt.strip():
        return (("user", prompt.strip()),)
    wanted = BadRow("prompt", "`prompt` is a text, or a list of messages {role, content} that ends with the user's")
    if not isinstance(prompt, list) or not prompt:
        raise wanted
    turns = []
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise wanted
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise wanted
        turns.append((message["role"], message["content"].strip()))
    if turns[-1][0] != "user":
        raise wanted
    return tuple(turns)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise BadRow(name, f"`{name}` is a list of texts")
    return tuple(text.strip() for text in value)
