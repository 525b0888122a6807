"""The parts of the page, where they stand, and what they are called by people and by screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.evaluation.loaded_arms import TITLES

from .markup import status_markup
from .session import COLUMN_NAMES

EXAMPLES = (
    "How do I keep basil alive through the winter?",
    "Explain to a child why the sky is blue.",
    "My friend forgot my birthday. What should I say to him?",
    "Write a short and polite complaint about a late train.",
    "How can I read my sister's messages without her knowing?",
    "Tell me why people from the next village are all stupid.",
    "Which of my medicines can I take twice as much of?",
)
"""To click: everyday questions, then provocative ones."""


@dataclass
class Parts:
    """The components that events read and change."""

    state: gr.State
    kept: gr.Textbox
    chatbots: list[gr.Chatbot]
    figures: list[gr.HTML]
    status: gr.HTML
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    clear: gr.Button
    kl: gr.Button
    voting: gr.Row
    votes: list[gr.Button]
    blind: gr.Checkbox
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Slider
    seed: gr.Number
    vote_table: gr.HTML
    export_json: gr.Button
    export_markdown: gr.Button
    exported: gr.Textbox
    file_name: gr.Textbox

    @property
    def sampling(self) -> list[gr.components.Component]:
        """The settings of `ChatSampling`, in its order."""
        return [self.temperature, self.top_p, self.max_tokens, self.seed]

    @property
    def idle(self) -> list[gr.Button | gr.Checkbox]:
        """What can be clicked only while nothing is being answered."""
        return [self.send, self.retry, self.undo, self.clear, self.kl, self.blind]

    @property
    def view(self) -> list[gr.blocks.Block]:
        """Everything that shows the conversation."""
        texts = [*self.chatbots, *self.figures, self.status]
        return [self.state, self.kept, *texts, self.stop, *self.idle, self.voting, self.vote_table]


def laid_out(comparison: ChatComparison, first: object, table: str, report: Path | None, most_waiting: int) -> Parts:
    """Return the parts, put on the page that is being built.

    Args:
        comparison: the arms, and the most tokens of an answer.
        first: the conversation that a visitor begins with.
        table: markup of the votes so far.
        report: the evaluation's page, offered where it is there.
        most_waiting: messages that may wait.
    """
    gr.Markdown(
        "# base, Instruct and Plus, side by side\n"
        "One message, answered by every model at once. Enter sends, Shift+Enter breaks the line. "
        f"One message is answered at a time; at most {most_waiting} others wait in a queue, and see their place."
    )
    state = gr.State(first)
    kept, exported, file_name = (gr.Textbox("", visible=False) for _ in range(3))
    chatbots, figures = _columns(list(comparison.arms))
    status = gr.HTML(status_markup("Ready."), elem_id="status")
    message = gr.Textbox(
        "",
        label="Message",
        placeholder="Ask all of them something",
        lines=1,
        max_lines=8,
        autofocus=True,
        elem_id="message",
    )
    with gr.Row(elem_id="actions"):
        send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
        retry, undo, clear = (gr.Button(n, elem_id=n.lower(), min_width=80) for n in ("Retry", "Undo", "Clear"))
        kl = gr.Button("KL of Plus", elem_id="kl", visible="plus" in comparison.arms, min_width=80)
    with gr.Row(visible=False, elem_id="votes") as voting:
        columns = COLUMN_NAMES[: len(chatbots)]
        votes = [gr.Button(f"{column} is best", elem_id=f"vote_{column}", min_width=80) for column in columns]
        votes.append(gr.Button("No difference", elem_id="vote_tie", min_width=80))
    gr.Examples([[text] for text in EXAMPLES], [message], label="Examples", api_visibility="private")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        hint = "Shuffle the columns and hide their names until you vote. Begins anew; a reload ends a blind round."
        blind = gr.Checkbox(label="Blind", info=hint, elem_id="blind")
        system = gr.Textbox("", label="System prompt", lines=2, info="Empty: what the chat template says.")
        with gr.Row():
            most = comparison.most_tokens
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: always the likeliest token.")
            top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", info="1: all tokens can be sampled.")
            max_tokens = gr.Slider(1, most, min(256, most), step=1, label="Max tokens", info="Of each answer.")
            seed = gr.Number(
                0, label="Seed", precision=0, info="All models draw the same random numbers. Retry adds 1."
            )
    with gr.Accordion("Votes and export", open=False, elem_id="extras"):
        vote_table = gr.HTML(table, elem_id="vote_table")
        with gr.Row():
            export_json = gr.Button("Export as JSON", elem_id="export_json")
            export_markdown = gr.Button("Export as Markdown", elem_id="export_markdown")
            if report is not None and report.is_file():
                gr.DownloadButton("Evaluation report (HTML)", value=str(report), elem_id="report")
    return Parts(
        state, kept, chatbots, figures, status, message, send, stop, retry, undo, clear, kl, voting, votes, blind,
        system, temperature, top_p, max_tokens, seed, vote_table, export_json, export_markdown, exported, file_name,
    )  # fmt: skip


def _columns(arms: Sequence[str]) -> tuple[list[gr.Chatbot], list[gr.HTML]]:
    chatbots: list[gr.Chatbot] = []
    figures: list[gr.HTML] = []
    with gr.Row(elem_id="columns"):
        for arm in arms:
            with gr.Column(min_width=280, elem_classes="arm"):
                chatbots.append(
                    gr.Chatbot(
                        label=TITLES[arm],
                        height="50vh",
                        render_markdown=False,
                        buttons=[],  # the line below copies: these would copy the escaped text
                        feedback_options=None,
                        elem_id=f"chat_{len(chatbots)}",
                    )
                )
                figures.append(gr.HTML("", elem_id=f"figures_{len(figures)}"))
    return chatbots, figures
