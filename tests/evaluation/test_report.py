"""The pages of an evaluation: figures, tables, a gallery, and nothing of a model's text that could do harm."""

from __future__ import annotations

import copy
import random
import struct
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_rlhf.evaluation.claims import claims
from lora_rlhf.evaluation.context import arm_figures
from lora_rlhf.evaluation.figures import COLOURS, write_figures
from lora_rlhf.evaluation.report import _number, claims_table, difference_text, write_report

HOSTILE = "<script>alert('x')</script> ``` | **bold** <img src=x onerror=y>"


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": value * 2}


def values(seed: int, n: int = 24, scale: float = 1.0) -> dict[str, list[float]]:
    chance = random.Random(seed)
    return {arm: [scale * (chance.random() + 0.2 * i) for _ in range(n)] for i, arm in enumerate(COLOURS)}


@pytest.fixture
def results() -> dict[str, Any]:
    """What an evaluation leaves: every suite, three arms."""
    kept = {"difference": {"value": -0.01, "low": -0.05, "high": 0.03, "stderr": 0.02, "n": 48}, "margin": 0.01}
    rate = {"raw": 0.9, "raw_low": 0.7, "raw_high": 0.97, "length_controlled": 0.8,
            "length_controlled_low": 0.6, "length_controlled_high": 0.9, "n": 24}  # fmt: skip
    suites = {
        "general": {
            "tasks": {f"task_{i}": arm_figures(values(i)) for i in range(7)},
            "details": {"kept": {"plus": {**kept, "verdict": "cannot tell", "needed_n": 1500}}},
        },
        "mt_bench": {
            "tasks": {"score": arm_figures(values(9, scale=3))},
            "details": {
                "categories": {f"category {i}": {"base": 4.0, "instruct": 5.0, "plus": 6.0} for i in range(8)},
                "against_base": {},
                "gallery": [
                    {"kind": "largest win", "category": "math", "question": ["one?", HOSTILE],
                     "answers": {arm: [HOSTILE, "two"] for arm in COLOURS},
                     "grades": {arm: [4.0, 5.5] for arm in COLOURS}}
                ],
            },
        },
        "moderation": {"tasks": {"safety": arm_figures(values(10)), "general ability": arm_figures(values(11))}},
        "bad_words": {
            "tasks": {"last_layer": arm_figures(values(12, scale=1e-5))},
            "details": {
                "by_layer": {arm: [interval(1e-4 / (i + 1)) for i in range(6)] for arm in COLOURS},
                "by_word": {f"word{i}": {arm: interval(1e-6 * (i + 1)) for arm in COLOURS} for i in range(14)},
            },
        },
        "preference": {
            "tasks": {"reward": arm_figures(values(13)), "kl_to_base": {"base": {**arm_figures(values(1))["base"]}}},
            "details": {
                "wins_by_reward": {"plus": rate},
                "over_optimised": {"value": None, "text": "cannot tell at this number of prompts"},
                "curve": [
                    {"step": s, "kl": 2.0 * s, "reward": interval(s), "referee": interval(s / 2)} for s in range(4)
                ],
            },
        },
    }  # fmt: skip
    for suite in suites.values():
        suite.setdefault("details", {})
        suite |= {"units": dict.fromkeys(suite["tasks"], "a unit"), "notes": ["A note."]}
    return {
        "arms": {arm: {"fingerprint": "0"} for arm in COLOURS}, "prompts": 24, "settings": {}, "suites": suites,
        "skipped": {}, "claims": claims(suites), "versions": {"torch": "2"},
    }  # fmt: skip


class Tags(HTMLParser):
    """Collects the tags of a page, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_every_suite_with_its_figure_inside(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    images = [attrs for tag, attrs in tags.found if tag == "img"]
    assert len(images) == 5
    assert all(image["alt"] and str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert "http" not in page and "url(" not in page  # nothing is loaded from elsewhere
    for title in ("General abilities", "Two-turn questions", "Moderation", "Bad words", "Preference", "The claims"):
        assert f">{title}</h2>" in page


def test_text_of_a_model_is_shown_and_does_nothing(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path)
    tags = Tags()
    tags.feed((tmp_path / "report.html").read_text())
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "iframe", "link"})
    assert not [attrs for tag, attrs in tags.found if tag == "img" and "onerror" in attrs]
    markdown = (tmp_path / "report.md").read_text()
    assert f"````text\n{HOSTILE}\n````" in markdown  # a longer fence than any in the text


def test_every_figure_is_a_png_of_its_own(results: dict[str, Any], tmp_path: Path) -> None:
    drawn = write_figures(results, tmp_path)
    assert list(drawn) == ["general", "mt_bench", "moderation", "bad_words", "preference"]
    for name, (text, file) in drawn.items():
        data = file.read_bytes()
        assert file == tmp_path / f"{name}.png" and text
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", data[16:24])) > 600


def test_a_suite_that_did_not_run_is_named_with_what_it_needs(results: dict[str, Any], tmp_path: Path) -> None:
    del results["suites"]["mt_bench"]
    results["skipped"]["mt_bench"] = "it needs a judge: --judge_model NAME"
    write_report(results, tmp_path)
    for file in ("report.md", "report.html"):
        assert "Not run: it needs a judge: --judge_model NAME." in (tmp_path / file).read_text()
    assert not (tmp_path / "mt_bench.png").exists()


def test_base_alone_and_one_item_can_be_reported(results: dict[str, Any], tmp_path: Path) -> None:
    alone = copy.deepcopy(results)
    alone["arms"] = {"base": {}}
    alone["suites"] = {
        "moderation": {
            "tasks": {"reward": arm_figures({"base": [0.5]})}, "details": {}, "units": {"reward": "u"}, "notes": []
        }
    }  # fmt: skip
    alone["claims"] = claims(alone["suites"])
    write_report(alone, tmp_path)
    assert "| reward (u) | 0.50 ± 0 | 1 |" in (tmp_path / "report.md").read_text()


def test_the_table_in_the_terminal_says_what_cannot_be_told(results: dict[str, Any]) -> None:
    shown = StringIO()
    Console(file=shown, width=200).print(claims_table(results))
    assert "keeps base's general abilities" in shown.getvalue()
    assert "cannot tell (n of about 1,500 would)" in shown.getvalue()


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [(0, "0", "0"), (1.234, "1.23", "+1.23"), (-0.0456, "−0.046", "−0.046"), (-1.234e-7, "−1.2e−07", "−1.2e−07")],
)
def test_numbers_have_the_digits_that_matter(value: float, plain: str, signed: str) -> None:
    assert (_number(value), _number(value, signed=True)) == (plain, signed)


def test_a_difference_without_interval_says_so() -> None:
    assert difference_text({"value": 1.0, "low": None, "high": None}) == "+1.00 [no interval]"
    assert difference_text(None) == ""
