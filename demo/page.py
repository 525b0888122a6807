"""The page's events: which click does what, and how the page is served."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.chat.conversation import (
    Conversation,
    conversation_markdown,
    conversation_record,
    restored_conversation,
)
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import TITLES
from lora_rlhf.memory_peak import device_answers, ran_out

from .layout import Parts, laid_out
from .markup import (
    column_messages,
    figures_markup,
    spoken_result,
    status_markup,
    vote_table_markup,
)
from .session import COLUMN_NAMES, ChatSessions

HERE = Path(__file__).parent
ON_MODELS: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
"""Events that use the models run one after the other."""
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
Updates = dict[Any, Any]
"""New values by component."""


def chat_page(comparison: ChatComparison, votes_file: Path, report: Path | None, most_waiting: int = 64) -> gr.Blocks:
    """Return the page.

    Args:
        comparison: the loaded arms.
        votes_file: where blind votes are kept.
        report: the evaluation's page, which is offered where it is there.
        most_waiting: messages that may wait.
    """
    sessions = ChatSessions(comparison, votes_file, most_waiting)
    with gr.Blocks(title="base, Instruct and Plus", fill_width=True, analytics_enabled=False) as page:
        parts = laid_out(
            comparison, sessions.new_conversation(), vote_table_markup(*sessions.vote_table()), report, most_waiting
        )
        events = PageEvents(sessions, parts)
        private: dict[str, Any] = {**ON_MODELS, "api_visibility": "private"}
        asked = [
            gr.on(
                [parts.message.submit, parts.send.click],
                events.ask,
                [parts.state, parts.message, parts.system, *parts.sampling],
                [parts.message, *parts.view],
                **AT_ONCE,
            ),
            parts.retry.click(events.ask_again, [parts.state, *parts.sampling], [parts.seed, *parts.view], **AT_ONCE),
        ]
        for event in asked:
            answered = event.then(
                events.answer,
                [parts.state],
                parts.view,
                show_progress="minimal",
                show_progress_on=parts.figures,
                **private,
            )
            answered.failure(events.stop, [parts.state], [parts.message, *parts.view], **AT_ONCE)
        parts.stop.click(events.stop, [parts.state], [parts.message, *parts.view], **AT_ONCE)
        parts.undo.click(events.take_back, [parts.state], [parts.message, *parts.view], **AT_ONCE)
        gr.on([parts.clear.click, parts.blind.input], events.begin, [parts.state, parts.blind], parts.view, **AT_ONCE)
        parts.kl.click(events.measure_kl, [parts.state], parts.view, **private)
        for i, button in enumerate(parts.votes):
            column = i if i < len(parts.chatbots) else None
            button.click(events.vote_for(column), [parts.state], parts.view, **AT_ONCE)
        for button, form in ((parts.export_json, "json"), (parts.export_markdown, "md")):
            files = [parts.exported, parts.file_name]
            written = button.click(events.export_as(form), [parts.state], files, **AT_ONCE)
            written.then(None, files, None, js="(text, name) => window.saveText(text, name)", **AT_ONCE)
        page.load(events.restore, [parts.kept], parts.view, js="() => window.keptConversation()", **AT_ONCE)
        parts.kept.change(None, [parts.kept], None, js="(text) => window.keepConversation(text)", **AT_ONCE)
        page.unload(events.leave)
        gr.api(compare_endpoint(sessions), api_name="compare", **ON_MODELS)
    return page


def served(page: gr.Blocks, host: str, port: int | None, share: bool, auth: Any, waiting: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        page: from `chat_page`.
        host: address to listen on.
        port: none: the first free one from 7860.
        share: whether to open a public link.
        auth: (name, password), or none.
        waiting: most messages that wait.
    """
    page.queue(max_size=waiting)
    try:
        page.launch(**launch_options(), server_name=host, server_port=port, share=share, auth=auth)
    except OSError as error:
        raise UserError(f"--host {host} --port {port or '7860 to 7959'}: cannot listen there: {error}") from None


def launch_options() -> dict[str, Any]:
    """Return how the page is launched, whoever does it: its look, and nothing of this machine within reach."""
    # system fonts: a page that fetches none works without a network, and tells nobody that it is open
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return {
        "theme": theme,
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "footer_links": ["api", "settings"],
        "max_file_size": 1,  # nothing is uploaded here
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "show_error": False,  # what is meant for people is shown all the same
    }


def words_for_failure(error: Exception) -> str:
    """Return what the visitor is told when answering failed."""
    if not device_answers():
        return "The graphics card has stopped answering; whoever runs this page has to start it again."
    if ran_out(error):
        return "Memory ran out over this. Ask for shorter answers, or clear the conversation, and try again."
    return "Something went wrong here; whoever runs this page finds it in the log. Try again."


class PageEvents:
    """What each event does: it calls the visitor's session and returns what the page shows then."""

    def __init__(self, sessions: ChatSessions, parts: Parts) -> None:
        self.sessions, self.parts, self.comparison = sessions, parts, sessions.comparison

    def ask(self, request: gr.Request, conversation: Conversation, text: Any, system: Any, *sampling: Any) -> Updates:
        """Take the message; the answers come in `answer`."""
        visitor = str(request.session_hash)
        try:
            self.sessions.asked(visitor, conversation, text, system, *sampling)
        except UserError as error:
            return self.refused(visitor, conversation, error)
        return {self.parts.message: ""} | self.shown(visitor, conversation, "Waiting for the models …")

    def ask_again(self, request: gr.Request, conversation: Conversation, *sampling: Any) -> Updates:
        """Ask for other answers, with the next seed."""
        visitor = str(request.session_hash)
        *settings, seed = sampling
        seed = seed + 1 if isinstance(seed, int | float) else seed
        try:
            self.sessions.asked_again(visitor, conversation, *settings, seed)
        except UserError as error:
            return self.refused(visitor, conversation, error)
        return {self.parts.seed: seed} | self.shown(visitor, conversation, "Waiting for the models …")

    def refused(self, visitor: str, conversation: Conversation, error: UserError) -> Updates:
        """Say what is wrong; answers that are on their way go on."""
        if self.sessions.has_asked(visitor):
            return {self.parts.status: status_markup(str(error), wrong=True)}
        return self.shown(visitor, conversation, str(error), wrong=True)

    def answer(self, request: gr.Request, conversation: Conversation) -> Iterator[Updates]:
        """Stream all columns, if something was asked; at the end scores, and the buttons come back."""
        visitor = str(request.session_hash)
        if not self.sessions.has_asked(visitor):
            yield {self.parts.status: gr.skip()}  # a generator that yields nothing would empty the page
            return
        try:
            for _ in self.sessions.answering(visitor):
                columns = zip(self.parts.chatbots, conversation.order, strict=True)
                texts = {chatbot: column_messages(conversation, arm, True) for chatbot, arm in columns}
                yield {self.parts.status: status_markup("Answering …")} | texts | self.figures(conversation)
        except UserError as error:
            yield self.shown(visitor, conversation, str(error), wrong=True)
        except Exception as error:  # whatever goes wrong in a model: the page goes on, and the log has it
            logging.getLogger(__name__).exception("answering failed")
            yield self.shown(visitor, conversation, words_for_failure(error), wrong=True)
        else:
            yield self.shown(visitor, conversation, spoken_result(conversation))

    def stop(self, request: gr.Request, conversation: Conversation) -> Updates:
        """End the answers at the next token, or take back a message that waits in the queue."""
        visitor = str(request.session_hash)
        message = self.sessions.stop(visitor)
        if message is None:
            return {self.parts.stop: gr.skip()}
        return {self.parts.message: message} | self.shown(visitor, conversation, "The message was taken back.")

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page."""
        self.sessions.leave(str(request.session_hash))

    def take_back(self, request: gr.Request, conversation: Conversation) -> Updates:
        """Take the last turn out; its message can be edited and sent again."""
        visitor = str(request.session_hash)
        try:
            self.sessions.refuse_if_waiting(visitor)
        except UserError as error:
            return self.refused(visitor, conversation, error)
        if not conversation.turns:
            return self.shown(visitor, conversation, "There is nothing to undo.")
        message = conversation.turns.pop().message
        return {self.parts.message: message} | self.shown(visitor, conversation, "The last message was taken back.")

    def begin(self, request: gr.Request, conversation: Conversation, blind: bool) -> Updates:
        """Begin a new conversation."""
        visitor = str(request.session_hash)
        try:
            self.sessions.refuse_if_waiting(visitor)
        except UserError as error:
            return self.refused(visitor, conversation, error) | {self.parts.blind: conversation.blind}
        text = "Ready. The names are hidden until you vote." if blind else "Ready."
        return self.shown(visitor, self.sessions.new_conversation(bool(blind)), text)

    def measure_kl(self, request: gr.Request, conversation: Conversation) -> Updates:
        """Show the KL of Plus to base on its last answer."""
        visitor = str(request.session_hash)
        try:
            kl = self.sessions.measure_kl(visitor, conversation)
        except UserError as error:
            return self.refused(visitor, conversation, error)
        if self.sessions.has_asked(visitor):  # meanwhile; what it shows goes first
            return self.figures(conversation)
        return self.shown(visitor, conversation, f"KL of Plus to base on its answer: {kl:.2f} nats.")

    def vote_for(self, column: int | None) -> Callable[..., Updates]:
        """Return the event of a vote's button."""

        def vote(request: gr.Request, conversation: Conversation) -> Updates:
            visitor = str(request.session_hash)
            try:
                self.sessions.vote(visitor, conversation, column)
            except UserError as error:
                if not conversation.voted:
                    return self.refused(visitor, conversation, error)
            columns = zip(COLUMN_NAMES, conversation.order, strict=False)
            names = ", ".join(f"{letter} was {TITLES[arm]}" for letter, arm in columns)
            return self.shown(visitor, conversation, f"Thank you. {names}.")

        return vote

    def restore(self, request: gr.Request, kept: Any) -> Updates:
        """Show the conversation that the browser's tab kept over a reload."""
        try:
            held = json.loads(kept) if kept else None
        except (TypeError, ValueError):
            held = None
        conversation = restored_conversation(held, list(self.comparison.arms)) or self.sessions.new_conversation()
        found = self.shown(str(request.session_hash), conversation, "Ready.")
        return found | {self.parts.blind: gr.Checkbox(value=conversation.blind, interactive=True)}

    def export_as(self, form: str) -> Callable[[Conversation], tuple[str, str]]:
        """Return the event of an export's button: (text, file name), which the browser writes."""

        def write(conversation: Conversation) -> tuple[str, str]:
            names = self.sessions.names(conversation)
            record = conversation_record(conversation, names, self.comparison.score_unit)
            if form == "json":
                return json.dumps(record, indent=1, ensure_ascii=False), "conversation.json"
            return conversation_markdown(record), "conversation.md"

        return write

    def shown(self, visitor: str, conversation: Conversation, text: str, wrong: bool = False) -> Updates:
        """Return what every part of the page shows; while answers are on their way, only Stop can be clicked.

        Args:
            visitor: whose page it is.
            conversation: theirs.
            text: of the status line.
            wrong: whether `text` says what was wrong with the input.
        """
        parts, hidden, busy = self.parts, conversation.names_are_hidden, self.sessions.has_asked(visitor)
        names = self.sessions.names(conversation)
        found: Updates = {parts.state: conversation, parts.status: status_markup(text, wrong)}
        found[parts.kept] = "" if hidden else json.dumps(asdict(conversation))
        found[parts.vote_table] = vote_table_markup(*self.sessions.vote_table())
        found |= {part: type(part)(interactive=not busy) for part in parts.idle}
        found[parts.kl] = gr.Button(interactive=not busy and not hidden)
        found[parts.stop] = gr.Button(interactive=busy)
        answered = any(turn.answers for turn in conversation.turns)
        found[parts.voting] = gr.Row(visible=hidden and answered and not busy)
        for chatbot, arm in zip(parts.chatbots, conversation.order, strict=True):
            found[chatbot] = gr.Chatbot(column_messages(conversation, arm, busy), label=names[arm])
        return found | self.figures(conversation)

    def figures(self, conversation: Conversation) -> Updates:
        """Return the lines below the columns."""
        unit, hidden = self.comparison.score_unit, conversation.names_are_hidden
        columns = zip(self.parts.figures, conversation.order, strict=True)
        return {column: figures_markup(conversation, arm, unit, hidden) for column, arm in columns}


def compare_endpoint(sessions: ChatSessions) -> Callable[..., Any]:
    """Return the function behind the API endpoint."""
    tokens = min(128, sessions.comparison.most_tokens)

    def compare(
        message: str,
        history: list[dict[str, str]] = [],  # noqa: B006 - Gradio's page shows it as the default
        system_prompt: str = "",
        max_tokens: int = tokens,
        temperature: float = 0.7,
        seed: int = 0,
        top_p: float = 1.0,
    ) -> Any:
        """Let every model answer a message, and return answers and figures as JSON.

        Partial answers stream on the way; the last value has `finished` true.

        Args:
            message: what all are asked.
            history: earlier rounds, {"role": "user" or "assistant", "content": text} in turns; the same for all.
            system_prompt: empty for what the chat template says.
            max_tokens: of each answer.
            temperature: from 0 (always the likeliest token) to 2.
            seed: of the random numbers, which are the same for all models.
            top_p: sample from the likeliest tokens with this probability together.

        Returns:
            {"finished": true, "answers": {"base": {"text", "score", "tokens", "ended", ...}, "instruct": ..., ...}}
        """
        try:
            yield from sessions.compared(message, history, system_prompt, max_tokens, temperature, top_p, seed)
        except UserError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

    return compare
