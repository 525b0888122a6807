"""The few pieces of HTML of the page; every text in them is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from lora_rlhf.chat.conversation import Conversation, figures, figures_line
from lora_rlhf.evaluation.loaded_arms import TITLES


def status_markup(text: str, wrong: bool = False) -> str:
    """Return the line that says what is going on, or what was wrong; screen readers read it out when it changes."""
    kind = 'role="alert" class="wrong"' if wrong else 'role="status" aria-live="polite"'
    return f"<p {kind}>{html.escape(text)}</p>"


def figures_markup(conversation: Conversation, arm: str, unit: str | None, hidden: bool) -> str:
    """Return the figures of all of a column's answers, the newest first; the page's script reads its numbers.

    It copies the answer whose line is clicked, and marks the bad words that a line names in its answer.

    Args:
        conversation: of the visitor.
        arm: of the column.
        unit: what scores are counted in.
        hidden: whether figures are kept back because they could tell which arm it is.
    """
    lines = []
    for i, turn in enumerate(conversation.turns):
        answer = turn.answers.get(arm)
        if answer is None:
            continue
        text = f"{answer.tokens} tokens · {answer.tokens_per_second:.1f} tokens/s"
        if answer.finished:
            text = figures_line(figures(answer, unit))
        if turn.kl is not None and arm == "plus":
            text += f" · KL to base {turn.kl:.2f} nats"
        words = html.escape(json.dumps([] if hidden else answer.bad_words), quote=True)
        copy = '<button type="button" class="copy-answer">Copy answer</button>' if answer.finished else ""
        shown = "figures are shown after your vote" if hidden else html.escape(text)
        lines.append(f'<li value="{i + 1}" data-answer="{i}" data-bad-words="{words}">{shown} {copy}</li>')
    return f'<ol class="figures">{"".join(reversed(lines))}</ol>'


def vote_table_markup(rows: Sequence[dict[str, Any]], ties: int) -> str:
    """Return how often each arm was voted best."""
    decided = rows[0]["votes"] if rows else 0
    if not decided and not ties:
        return "<p>No votes yet. Turn on <b>Blind</b> in the settings, ask, and vote.</p>"
    cells = ""
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
        cells += f"<tr><th scope='row'>{TITLES[row['arm']]}</th><td>{row['wins']}</td><td>{share}</td></tr>"
    return (
        "<table><caption>Blind votes on these models: voted best, and the share with its 95 % interval</caption>"
        "<thead><tr><th scope='col'>model</th><th scope='col'>votes</th><th scope='col'>share</th></tr></thead>"
        f"<tbody>{cells}</tbody></table><p>Votes that took a side: {decided}; that saw no difference: {ties}.</p>"
    )


def column_messages(conversation: Conversation, arm: str, busy: bool) -> list[Any]:
    """Return what an arm's column shows, as a chatbot takes it; what was written is text there, never markup.

    Args:
        conversation: of the visitor.
        arm: of the column.
        busy: whether answers to the last message are on their way.
    """
    found: list[Any] = []
    for turn in conversation.turns:
        answer = turn.answers.get(arm)
        waiting = busy and turn is conversation.turns[-1] and not (answer and answer.finished)
        text = answer.text if answer and answer.text else "…" if waiting else "(no answer)"
        for role, said in (("user", turn.message), ("assistant", text)):
            # a part of its own: a chatbot takes the indentation out of plain strings
            found.append({"role": role, "content": [{"type": "text", "text": html.escape(said, quote=False)}]})
    return found


def spoken_result(conversation: Conversation) -> str:
    """Return what the status line says when the answers are there."""
    if not conversation.turns or not conversation.turns[-1].answers:
        return "Ready."
    answers = conversation.turns[-1].answers.values()
    left_out = max(answer.left_out for answer in answers)
    text = "Stopped." if any(answer.stopped for answer in answers) else "All answers are there."
    if left_out:
        text += f" The conversation is too long to be read whole: its oldest {left_out} rounds were left out."
    return text
