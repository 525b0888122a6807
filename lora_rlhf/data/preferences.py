"""Preference pairs: one shape for all source formats, and a count of the rows that cannot be used, by reason."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_rlhf.config import RunConfig
from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.chat import Message, answer_ids, prompt_ids
from lora_rlhf.data.rows import Split, dataset_rows
from lora_rlhf.errors import UserError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_FIRST_TURN = re.compile(r"\s*(?=(?:Human|Assistant):)")
_LIKE_A_TURN = re.compile(r"\s*(?:human|assistant)\s*:", re.IGNORECASE)
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a worse answer."""

    prompt: tuple[tuple[str, str], ...]
    """(role, content) of each turn, the last one the user's."""
    chosen: str
    rejected: str
    columns: tuple[tuple[str, Any], ...] = ()
    """The row's other columns, which reward functions are given."""

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


def prompts_and_columns(pairs: Sequence[PreferencePair]) -> tuple[list[list[Message]], dict[str, list[Any]]]:
    """Return the messages of each pair's prompt, and the other columns by name (none where a pair lacks one)."""
    rows = [dict(pair.columns) for pair in pairs]
    names = sorted({name for row in rows for name in row})
    return [pair.messages for pair in pairs], {name: [row.get(name) for row in rows] for name in names}


@dataclass
class PairReport:
    """How many rows were read, kept, and left out for which reason."""

    read: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first_bad: str | None = None
    """Where the first row without preference data is, and what is wrong with it; none where there was none."""

    def skip(self, bad_rows: BadRows) -> None:
        """Count the rows that were no preference data."""
        self.read += bad_rows.reasons.total()
        self.left_out += bad_rows.reasons
        self.first_bad = self.first_bad or bad_rows.first

    def leave_out(self, reason: str, rows: int) -> None:
        """Count `rows` rows, if any, as left out for `reason`."""
        if rows > 0:
            self.left_out[reason] += rows

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.left_out.most_common())
        return f"{self.kept} of {self.read} rows" + (
            (f" (left out: {reasons})" if reasons else "")
            + (f"; the first bad row: {self.first_bad}" if self.first_bad else "")
        )


class UnusableRow(Exception):
    """A row that is no preference pair; its text is the reason it is counted under."""


def pair_from_row(row: dict[str, Any]) -> PreferencePair:
    """Return the pair in a row of any supported format.

    Formats: TRL's explicit prompt (`prompt`, `chosen`, `rejected`) and implicit prompt (`chosen`, `rejected` that begin
    alike), each as text or as messages; text in HH-RLHF's "\\n\\nHuman: ... \\n\\nAssistant: ..." form becomes turns.

    Raises:
        UnusableRow: with the reason.
    """
    chosen, rejected = _turns(row.get("chosen")), _turns(row.get("rejected"))
    explicit = _turns(row.get("prompt"), default_role="user") if row.get("prompt") is not None else None
    if explicit and explicit[-1][0] == "assistant" and not explicit[-1][1]:  # "...\n\nAssistant:"
        explicit = explicit[:-1]
    if (chosen[-1][0] == "text") != (rejected[-1][0] == "text"):
        raise UnusableRow("one answer is a dialogue, the other is not")
    if explicit is not None and chosen[0][0] in ("text", "assistant"):  # else the dialogues hold the prompt already
        chosen, rejected = explicit + _as_answer(chosen), explicit + _as_answer(rejected)
    elif chosen[-1][0] == "text" or rejected[-1][0] == "text":
        chosen, rejected = _split_texts(chosen[-1][1], rejected[-1][1])
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow("dialogues differ before the last turn")
    prompt, (last_role, good), bad = chosen[:-1], chosen[-1], rejected[-1][1]
    if last_role != "assistant" or rejected[-1][0] != "assistant":
        raise UnusableRow("last turn is not the assistant's")
    if not prompt or prompt[-1][0] != "user" or not prompt[-1][1].strip():
        raise UnusableRow("empty prompt")
    good, bad = good.strip(), bad.strip()
    if not good or not bad:
        raise UnusableRow("empty answer")
    if good == bad:
        raise UnusableRow("chosen equals rejected")
    others = tuple((k, v) for k, v in row.items() if k not in ("prompt", "chosen", "rejected"))
    return PreferencePair(tuple(prompt), good, bad, others)


def preference_pairs(config: RunConfig, tokenizer: Any, split: Split) -> tuple[list[PreferencePair], PairReport]:
    """Return the usable pairs of the config's mixture in a seeded order, with a report of what was left out.

    Raises:
        UserError: a bad row, where those are not to be skipped, or no usable row left in one of the data sets.
    """
    report = PairReport()
    parts = []
    for name in config.dataset_name:
        bad_rows = BadRows(skip=config.on_bad_rows == "skip")
        rows = dataset_rows(name, split, bad_rows)
        report.skip(bad_rows)
        part = _usable(rows, name, config, tokenizer, report)
        random.Random(config.seed).shuffle(part)
        parts.append(part)
    pairs = _mixed(parts, config.dataset_weights)
    report.leave_out("beyond dataset_weights", sum(map(len, parts)) - len(pairs))
    random.Random(config.seed).shuffle(pairs)
    limit = config.max_train_pairs if split == "train" else config.max_eval_pairs
    if limit is not None:
        report.leave_out(f"beyond max_{'train' if split == 'train' else 'eval'}_pairs", len(pairs) - limit)
        pairs = pairs[:limit]
    report.kept = len(pairs)
    return pairs, report


def digest_of_pairs(pairs: Sequence[PreferencePair]) -> str:
    """Return a SHA-256, in hex, of what the pairs say, in their order."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(repr((pair.prompt, pair.chosen, pair.rejected)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _usable(
    rows: Sequence[dict[str, Any]], name: str, config: RunConfig, tokenizer: Any, report: PairReport
) -> list[PreferencePair]:
    kept, left_out = [], Counter[str]()
    for row in rows:
        try:
            pair = pair_from_row(row)
            _check_lengths(pair, config, tokenizer)
            kept.append(pair)
        except UnusableRow as reason:
            left_out[str(reason)] += 1
    report.read += len(rows)
    report.left_out += left_out
    if not kept:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common()) or "it has no rows"
        raise UserError(f"dataset_name: no usable pair in {name} ({reasons})")
    return kept


def _check_lengths(pair: PreferencePair, config: RunConfig, tokenizer: Any) -> None:
    try:
        prompt = len(prompt_ids(tokenizer, pair.messages))
    except Exception:  # whatever a template raises for turns it does not know
        raise UnusableRow("the chat template refuses it") from None
    if prompt > config.max_prompt_length:
        raise UnusableRow(f"prompt over {config.max_prompt_length} tokens")
    if prompt + max(len(answer_ids(tokenizer, a)) for a in (pair.chosen, pair.rejected)) > config.max_length:
        raise UnusableRow(f"over {config.max_length} tokens")


def _mixed(parts: list[list[PreferencePair]], weights: list[float]) -> list[PreferencePair]:
    """Return the largest mixture of `parts` with the given shares; all rows where no weights are given."""
    if not weights:
        return [pair for part in parts for pair in part]
    total = min(len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True))
    sizes = [max(1, round(total * weight / sum(weights))) for weight in weights]
    return [pair for part, size in zip(parts, sizes, strict=True) for pair in part[:size]]


def _turns(value: Any, default_role: str = "text") -> list[tuple[str, str]]:
    """Return (role, content) turns of a text or of messages; plain text is one turn of `default_role`."""
    if isinstance(value, str):
        if marked := _LIKE_A_TURN.match(value):
            value = _FIRST_TURN.sub("\n\n", value.replace("\r\n", "\n"), count=1)
        spans = list(_TURN.finditer(value))
        if not spans or value[: spans[0].start()].strip():
            if marked:  # else the markers would be learnt as what people say
                raise UnusableRow("turns are not marked by \\n\\nHuman: and \\n\\nAssistant:")
            return [(default_role, value)]
        ends = [span.start() for span in spans[1:]] + [len(value)]
        return [(_ROLES[s[1]], value[s.end() : end].strip()) for s, end in zip(spans, ends, strict=True)]
    if isinstance(value, list) and value:
        turns = []
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise UnusableRow("not text or messages")
            if message.get("role") not in ("system", "user", "assistant"):
                raise UnusableRow("unknown role")
            turns.append((message["role"], message["content"]))
        return turns
    raise UnusableRow("empty answer" if value in (None, []) else "not text or messages")


def _as_answer(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [("assistant" if role == "text" else role, content) for role, content in turns]


def _split_texts(chosen: str, rejected: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split two plain texts where they begin to differ, back to the start of that word: TRL's implicit prompt."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chosen), len(rejected))
    while same > 0 and not chosen[same - 1].isspace():
        same -= 1
    prompt = ("user", chosen[:same].strip())
    return [prompt, ("assistant", chosen[same:])], [prompt, ("assistant", rejected[same:])]
