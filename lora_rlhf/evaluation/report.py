"""The pages of an evaluation: report.md, a self-contained report.html with its figures, and the table of claims."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from lora_rlhf.evaluation.figures import COLOURS, write_figures
from lora_rlhf.evaluation.loaded_arms import TITLES
from lora_rlhf.run import write_text

SUITE_TITLES = {
    "general": "General abilities", "mt_bench": "Two-turn questions", "moderation": "Moderation",
    "safety": "Safety", "bad_words": "Bad words", "preference": "Preference",
}  # fmt: skip


@dataclass(frozen=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Cells:
    """A table; the first column is text, the others are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows."""

    text: str
    file: Path


@dataclass(frozen=True)
class Case:
    """A question with the arms' answers side by side."""

    title: str
    question: Sequence[str]
    answers: Mapping[str, Sequence[str]]


Block = Heading | Text | Cells | Picture | Case


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write report.md, report.html and the figures of `results` (the content of results.json) to `folder`."""
    blocks = list(_blocks(results, write_figures(results, folder)))
    write_text(folder / "report.md", "\n\n".join(map(_as_markdown, blocks)) + "\n")
    write_text(folder / "report.html", _page(blocks))


def claims_table(results: Mapping[str, Any]) -> Table:
    """Return the table of claims for the terminal."""
    table = Table(title="claims, each against base", title_justify="left")
    for column in ("claim", "arm", "measured by", "difference [95 %]", "n", "verdict"):
        table.add_column(column)
    for row in _claim_rows(results["claims"]):
        table.add_row(*row)
    return table


def _blocks(results: Mapping[str, Any], figures: Mapping[str, tuple[str, Path]]) -> Iterator[Block]:
    arms = ", ".join(TITLES[arm] for arm in results["arms"])
    yield Heading("Evaluation")
    yield Text(
        f"{arms}, on {results['prompts']} held-out prompts where a suite does not say otherwise. Differences are to "
        "base over the same items, with 95 % intervals. A figure whose interval holds 0 does not tell the arms apart."
    )
    if rows := _claim_rows(results["claims"]):
        yield Heading("The claims")
        yield Cells(("claim", "arm", "measured by", "difference [95 %]", "n", "verdict"), rows)
    for name, suite in results["suites"].items():
        yield Heading(SUITE_TITLES[name])
        if name in figures:
            yield Picture(*figures[name])
        yield Cells(*_figures_by_task(suite))
        yield from map(Text, _remarks(name, suite))
        yield from map(Text, suite["notes"])
        for case in suite["details"].get("gallery", []):
            title = f"{case['kind']}, {case['category']}"
            answers = {
                f"{TITLES[arm]} ({', '.join(f'{g:g}' for g in case['grades'][arm])})": texts
                for arm, texts in case["answers"].items()
            }
            yield Case(title, case["question"], answers)
    for name, reason in results["skipped"].items():
        yield Heading(SUITE_TITLES[name])
        yield Text(f"Not run: {reason}.")
    if counts := results.get("judge_counts"):
        yield Text("Judge, in this run: " + ", ".join(f"{n} {what}" for what, n in counts.items()) + ".")
    yield Text("Versions: " + ", ".join(f"{name} {v}" for name, v in results["versions"].items()) + ".")


def _claim_rows(claims: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for row in claims:
        verdict = row["verdict"] + (f" (n of about {row['needed_n']:,} would)" if row["needed_n"] else "")
        rows.append(
            [
                row["claim"],
                TITLES[row["arm"]],
                row["measure"],
                difference_text(row["difference"]),
                str(row["n"]),
                verdict,
            ]
        )
    return rows


def _figures_by_task(suite: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    arms = [arm for arm in COLOURS if any(arm in figures for figures in suite["tasks"].values())]
    others = [arm for arm in arms if arm != "base"]
    to_instruct = any("difference_to_instruct" in of_task.get("plus", {}) for of_task in suite["tasks"].values())
    head = ["task", *(TITLES[arm] for arm in arms), *(f"{TITLES[arm]} − base" for arm in others)]
    head += [*([f"{TITLES['plus']} − {TITLES['instruct']}"] if to_instruct else []), "n"]
    rows = []
    for task, figures in suite["tasks"].items():
        cells = [f"{task.replace('_', ' ')} ({suite['units'][task]})"]
        cells += [_value_text(figures[arm]) if arm in figures else "" for arm in arms]
        cells += [difference_text(figures[arm]["difference"]) if arm in figures else "" for arm in others]
        if to_instruct:
            cells.append(difference_text(figures.get("plus", {}).get("difference_to_instruct")))
        rows.append([*cells, str(max(figure["n"] for figure in figures.values()))])
    return head, rows


def _remarks(name: str, suite: Mapping[str, Any]) -> Iterator[str]:
    details = suite["details"]
    if name == "general":
        for arm, kept in details["kept"].items():
            needed = f"; about {kept['needed_n']:,} items would tell" if kept["needed_n"] else ""
            yield (
                f"{TITLES[arm]} against base over all tasks, each weighing the same: "
                f"{difference_text(kept['difference'])}. Ability kept within {100 * kept['margin']:g} points: "
                f"{kept['verdict']}{needed}."
            )
    if name == "preference":
        for reading in ("reward", "referee"):
            for arm, rate in details.get(f"wins_by_{reading}", {}).items():
                yield (
                    f"{TITLES[arm]} wins against base by the {reading}: {rate['raw']:.0%} "
                    f"[{rate['raw_low']:.0%}, {rate['raw_high']:.0%}]; at equal length {rate['length_controlled']:.0%} "
                    f"[{rate['length_controlled_low']:.0%}, {rate['length_controlled_high']:.0%}]."
                )
        if "over_optimised" in details:
            yield f"Over-optimisation: {details['over_optimised']['text']}."


def _number(value: float, signed: bool = False) -> str:
    """Return a number as people read it: enough digits, and no more."""
    form = "0" if value == 0 else ".1e" if abs(value) < 1e-3 else ".3f" if abs(value) < 0.1 else ".2f"
    return "0" if form == "0" else f"{value:{'+' if signed else ''}{form}}".replace("-", "−")


def _value_text(figure: Mapping[str, Any]) -> str:
    return f"{_number(figure['value'])} ± {_number(figure['stderr'])}"


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """Return a difference with its interval; empty for none."""
    if difference is None:
        return ""
    value = _number(difference["value"], signed=True)
    if difference["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{_number(difference['low'], signed=True)}, {_number(difference['high'], signed=True)}]"


def _as_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"{'#' if text == 'Evaluation' else '##'} {text}"
        case Text(text):
            return _safe_markdown(text)
        case Cells(head, rows):
            lines = [head, ["---"] * len(head), *rows]
            return "\n".join("| " + " | ".join(_safe_markdown(cell) for cell in line) + " |" for line in lines)
        case Picture(text, file):
            return f"![{text}]({file.name})"
        case Case(title, question, answers):
            parts = [f"### {title}"]
            for turn, asked in enumerate(question):
                parts.append(f"**Question {turn + 1}**\n\n" + _quoted(asked))
                parts += [f"*{arm}*\n\n" + _quoted(texts[turn]) for arm, texts in answers.items()]
            return "\n\n".join(parts)


def _safe_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _quoted(text: str) -> str:
    """Return text of a model as a code block, in which nothing is read as Markdown."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _page(blocks: Sequence[Block]) -> str:
    body = "\n".join(map(_as_html, blocks))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
        color: #1c1c1c; background: #fff; }}
h1, h2, h3 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .3rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ text-align: left; padding: .35rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ background: #f3f3f3; }} figure {{ margin: 1rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .9rem; }}
.case {{ border: 1px solid #ccc; border-radius: .4rem; padding: .2rem 1rem 1rem; margin: 1rem 0; }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .2rem 0; background: #f7f7f7;
       padding: .5rem .7rem; border-radius: .3rem; max-height: 18rem; overflow-y: auto; }}
</style></head><body>
{body}
</body></html>
"""


def _as_html(block: Block) -> str:
    match block:
        case Heading(text):
            level = 1 if text == "Evaluation" else 2
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Cells(head, rows):
            top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
            lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(text, file):
            data = base64.b64encode(file.read_bytes()).decode()
            image = f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>"
        case Case(title, question, answers):
            turns = []
            for turn, asked in enumerate(question):
                columns = "".join(
                    f"<div><strong>{escape(arm)}</strong><pre>{escape(texts[turn])}</pre></div>"
                    for arm, texts in answers.items()
                )
                asked_html = f"<p><strong>Question {turn + 1}</strong></p><pre>{escape(asked)}</pre>"
                turns.append(f'{asked_html}<div class="answers">{columns}</div>')
            return f'<section class="case"><h3>{escape(title)}</h3>{"".join(turns)}</section>'
