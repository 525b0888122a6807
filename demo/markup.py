"""The few pieces of HTML of the page; every text in them is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from lora_rlhf.chat.comparison import Answer
from lora_rlhf.chat.conversation import Conversation, figures, figures_line
from lora_rlhf.evaluation.loaded_arms import TITLES


def status_markup(text: str, wrong: bool = False) -> str:
    """Return the line that says what is going on, or what was wrong; screen readers read it out when it changes."""
    kind = 'role="alert" class="wrong"' if wrong else 'role="status" aria-live="polite"'
    return f"<p {kind}>{html.escape(text)}</p>"


def figures_markup(answer: Answer | None, unit: str | None, hidden: bool, extra: str = "") -> str:
    """Return the line below a column; the page's script marks the bad words that it names in the text above.

    Args:
        answer: the last one of the column, if there is one.
        unit: what scores are counted in.
        hidden: whether figures are kept back because they could tell which arm it is.
        extra: a figure more.
    """
    if answer is None:
        return '<p class="figures"></p>'
    if hidden:
        return '<p class="figures">figures are shown after your vote</p>'
    words = html.escape(json.dumps(answer.bad_words), quote=True)
    if not answer.finished:
        line, copy = f"{answer.tokens} tokens · {answer.tokens_per_second:.1f} tokens/s", ""
    else:
        line = " · ".join(filter(None, (figures_line(figures(answer, unit)), extra)))
        copy = ' <button type="button" class="copy-answer">Copy answer</button>'
    return f'<p class="figures" data-bad-words="{words}">{html.escape(line)}{copy}</p>'


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


def column_messages(conversation: Conversation, arm: str) -> list[Any]:
    """Return what an arm's column shows, as a chatbot takes it; what was written is text there, never markup."""
    found: list[Any] = []
    for turn in conversation.turns:
        found.append({"role": "user", "content": html.escape(turn.message, quote=False)})
        answer = turn.answers.get(arm)
        text = answer.text if answer else ""
        if not text:
            text = "(no answer)" if answer and answer.finished else "…"
        found.append({"role": "assistant", "content": html.escape(text, quote=False)})
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
