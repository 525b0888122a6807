"""The page in a real browser: everything a visitor can do.

`LORA_RLHF_DEMO_RUN=runs/embedded pytest tests/demo/test_page.py` does the same with a real run's answers;
`LORA_RLHF_SCREENSHOTS=FOLDER` keeps a picture of each state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_page import Served, eventually
from visitor import Visitor

playwright = pytest.importorskip("playwright.sync_api")

ARMS = ("base", "Instruct", "Plus")


Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let an arm answer with a given text."""
    from lora_rlhf.chat.comparison import ChatComparison

    texts: dict[str, tuple[str, list[str]]] = {}
    real = ChatComparison._read

    def read(self: ChatComparison, names: list[str], decoding: Any, answers: Any, seconds: float) -> None:
        real(self, names, decoding, answers, seconds)
        for arm in texts.keys() & answers.keys():
            answers[arm].text, answers[arm].bad_words = texts[arm]

    monkeypatch.setattr(ChatComparison, "_read", read)

    def order(arm: str, text: str, bad_words: list[str] | None = None) -> None:
        texts[arm] = (text, bad_words or [])

    return order


def test_three_streams_fill_and_scores_appear(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    assert visitor.labels() == list(ARMS)
    visitor.tab.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => window.seen.push([0, 1, 2].map(
          (i) => document.querySelector(`#figures_${i}`).innerText.match(/(\\d+) tokens/)?.[1] ?? null)))
        .observe(document.querySelector("#columns"), {childList: true, subtree: true, characterData: true}); }"""
    )
    visitor.ask("How do I keep basil alive through the winter?")
    seen = visitor.tab.evaluate("window.seen")
    for column in zip(*seen, strict=True):
        counts = [int(count) for count in column if count]
        assert len(set(counts)) >= 3 and counts == sorted(counts)  # token by token, all columns together
    for text in visitor.figures():
        assert re.search(
            r"reward [+-]\d+\.\d\d \(base's sd\) · \d+ tokens · \d+\.\d tokens/s · (ended by|cut at)", text
        )
    assert visitor.texts("user") == [["How do I keep basil alive through the winter?"]] * 3
    assert all(len(column) == 1 for column in visitor.texts())
    assert visitor.tab.input_value("#message textarea") == ""
    visitor.picture("answers")


def test_shift_enter_breaks_the_line(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.tab.fill("#message textarea", "one")
    visitor.tab.press("#message textarea", "Shift+Enter")
    visitor.tab.type("#message textarea", "two")
    assert visitor.tab.input_value("#message textarea") == "one\ntwo"
    visitor.tab.press("#message textarea", "Enter")
    visitor.wait_for("All answers are there")
    assert visitor.texts("user") == [["one\ntwo"]] * 3


def test_examples_fill_the_message(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.tab.get_by_text("Explain to a child why the sky is blue.").click()
    playwright.expect(visitor.tab.locator("#message textarea")).to_have_value("Explain to a child why the sky is blue.")


def test_stop_stops_at_the_next_token(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    playwright.expect(visitor.tab.locator("#stop")).to_be_disabled()
    with served.held():
        visitor.ask("Tell me a very long story about a ship.", settle=False)
        playwright.expect(visitor.tab.locator("#stop")).to_be_enabled()
        playwright.expect(visitor.tab.locator("#send")).to_be_disabled()
        assert eventually(lambda: served.comparison.under_way == 1)
        visitor.click("stop")
        visitor.tab.wait_for_timeout(300)
    visitor.wait_for("Stopped.")
    assert all("stopped" in text and "reward" not in text for text in visitor.figures())
    assert all(int(re.findall(r"(\d+) tokens", text)[0]) <= 1 for text in visitor.figures())
    assert served.comparison.under_way == 0
    visitor.ask("Go on.")


def test_retry_undo_and_clear(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.set("Temperature", "1")
    visitor.set("Max tokens", "12")
    visitor.ask("How do I keep basil alive?")
    first = visitor.texts()
    visitor.click("retry")
    assert eventually(lambda: visitor.tab.get_by_label("Seed").input_value() == "1")
    visitor.wait_for("All answers are there")
    assert visitor.texts() != first
    assert [len(column) for column in visitor.texts()] == [1, 1, 1]
    again = visitor.texts()
    visitor.ask("And mint?")
    assert [column[0] for column in visitor.texts()] == [column[0] for column in again]
    visitor.click("undo")
    visitor.wait_for("taken back")
    assert visitor.texts() == again
    assert visitor.tab.input_value("#message textarea") == "And mint?"
    visitor.click("clear")
    visitor.wait_for("Ready")
    assert visitor.texts() == [[], [], []] and visitor.figures() == [""] * 3
    assert visitor.tab.locator("#columns [aria-label=Clear]:visible").count() == 0  # one column cannot be emptied alone
    visitor.click("undo")
    visitor.wait_for("nothing to undo")
    visitor.click("retry")
    visitor.wait_for("there is no message to ask again")


def test_kl_on_request(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.click("kl")
    visitor.wait_for("there is no answer of Plus yet")
    visitor.ask("How do I keep basil alive?")
    visitor.click("kl")
    visitor.wait_for("KL of Plus to base on its answer:")
    assert re.search(r"KL to base -?\d+\.\d\d nats", visitor.figures()[2])
    assert "KL" not in visitor.figures()[0] + visitor.figures()[1]


def test_a_blind_round_with_vote_and_reveal(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    visitor.tab.click("#settings button")
    visitor.tab.get_by_label("Blind").check()
    visitor.wait_for("hidden until you vote")
    assert visitor.labels() == ["A", "B", "C"] and not visitor.tab.is_visible("#vote_A")
    visitor.ask("How do I keep basil alive?")
    hidden = visitor.tab.inner_text("#columns")
    assert not any(word in hidden for word in (*ARMS, "reward", "tokens/s"))
    assert visitor.tab.locator("#kl").is_disabled()
    visitor.picture("blind")
    before = served.votes.read_bytes() if served.votes.is_file() else b""
    visitor.click("vote_B")
    visitor.wait_for("Thank you")
    assert sorted(visitor.labels()) == sorted(ARMS)
    assert f"B was {visitor.labels()[1]}" in visitor.tab.inner_text("#status")
    assert all("tokens/s" in text for text in visitor.figures())
    assert not visitor.tab.is_visible("#vote_A")
    vote = json.loads(served.votes.read_bytes()[len(before) :])
    assert vote["winner"] == visitor.labels()[1].lower()
    assert vote["turns"][0]["message"] == "How do I keep basil alive?"
    visitor.tab.click("#extras button")
    table = visitor.tab.inner_text("#vote_table")
    assert re.search(rf"{visitor.labels()[1]}\s+\d+\s+\d+% \[\d+%, \d+%\]", table)
    visitor.picture("voted")
    visitor.click("clear")
    visitor.wait_for("hidden until you vote")
    assert visitor.labels() == ["A", "B", "C"]


def test_exports_are_files_with_everything_said(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("How do I keep basil alive?")
    visitor.tab.click("#extras button")
    with visitor.tab.expect_download() as download:
        visitor.click("export_json")
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    answers = record["turns"][0]["answers"]
    assert download.value.suggested_filename == "conversation.json" and list(answers) == list(ARMS)
    assert [answer["text"] or "(no answer)" for answer in answers.values()] == [column[0] for column in visitor.texts()]
    with visitor.tab.expect_download() as download:
        visitor.click("export_markdown")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert download.value.suggested_filename == "conversation.md" and "### Plus" in text
    with visitor.tab.expect_download() as download:
        visitor.click("report")
    assert "the evaluation" in Path(download.value.path()).read_text(encoding="utf-8")


def test_answers_are_shown_and_copied_as_they_were_given(visit: Callable[..., Visitor], say: Say) -> None:
    code = "def f(x):\n    if x < 1:\n\treturn x\n    return 2  # & more"
    say("plus", code)
    visitor = visit()
    visitor.ask("One")
    visitor.ask("  indented\n      message")
    assert visitor.texts()[2] == [code, code]
    assert visitor.texts("user")[0][1] == "indented\n      message"
    for which in (0, 1):  # of the newest answer, and of the one before
        visitor.tab.locator("#figures_2 .copy-answer").nth(which).click()
        playwright.expect(visitor.tab.locator("#figures_2 .copy-answer").nth(which)).to_have_text("Copied")
        assert visitor.tab.evaluate("navigator.clipboard.readText()") == code


def test_a_reload_keeps_the_conversation(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    visitor.ask("How do I keep basil alive?")
    texts, figures = visitor.texts(), visitor.figures()
    visitor.open(served.url)
    assert eventually(lambda: visitor.texts() == texts)
    assert visitor.figures() == figures
    visitor.ask("And mint?")
    assert [len(column) for column in visitor.texts()] == [2, 2, 2]
    visitor.click("clear")
    visitor.wait_for("Ready")
    visitor.open(served.url)
    assert visitor.texts() == [[], [], []]


def test_what_is_wrong_is_said_and_the_page_goes_on(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    for text, words in (
        ("   ", "message is empty"),
        ("a" * 100_000, "100,000 characters"),
        ("ab " * 9_000, "tokens where"),
    ):
        visitor.ask(text, settle=False)
        visitor.wait_for(words)
        assert visitor.texts() == [[], [], []]
        assert visitor.tab.inner_text("#send") == "Send"
    visitor.set("Seed", "")
    visitor.ask("hello", settle=False)
    visitor.wait_for("seed is a whole number")
    visitor.set("Seed", "7")
    visitor.ask("hello")


def test_markup_is_text(visit: Callable[..., Visitor], say: Say) -> None:
    """In messages and in answers alike, nothing is fetched, run or hidden."""
    hostile = (
        "<script>alert(1)</script><img src=http://x.invalid/x onerror=alert(2)><b>b</b> [a](javascript:alert(3)) &lt;"
    )
    for arm in ("base", "instruct", "plus"):
        say(arm, hostile)
    visitor = visit()
    visitor.ask(hostile)
    assert visitor.texts("user") == [[hostile]] * 3
    assert visitor.texts() == [[hostile]] * 3
    assert visitor.tab.locator("#columns .arm [data-testid=bot] :is(script, img, b, a)").count() == 0


def test_bad_words_are_named_and_marked_in_every_answer(visit: Callable[..., Visitor], say: Say) -> None:
    say("plus", "Damn, that <damn> basil. İ Say damnation, damn_it or Goddamn; damn.", ["damn"])
    visitor = visit()
    visitor.ask("How do I keep basil alive?")
    assert "bad words: damn" in visitor.figures()[2]
    ranges = "[...(CSS.highlights.get('bad-words') ?? [])].map((range) => range.toString())"
    assert eventually(lambda: visitor.tab.evaluate(ranges) == ["Damn", "damn", "damn"])
    visitor.picture("bad_words")
    visitor.ask("And mint?")
    assert eventually(lambda: len(visitor.tab.evaluate(ranges)) == 6)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_stacks_the_columns(visit: Callable[..., Visitor], theme: str) -> None:
    visitor = visit(f"?__theme={theme}", viewport={"width": 390, "height": 844}, has_touch=True, color_scheme=theme)
    visitor.ask("How do I keep basil alive through the winter?")
    boxes = [visitor.tab.locator(f"#chat_{i}").bounding_box() for i in range(3)]
    assert [box["x"] for box in boxes] == [boxes[0]["x"]] * 3
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and all(box["width"] > 300 for box in boxes)
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    visitor.picture(f"phone_{theme}")


def test_dark_mode_is_readable(visit: Callable[..., Visitor]) -> None:
    visitor = visit("?__theme=dark", color_scheme="dark")
    visitor.ask("How do I keep basil alive through the winter?")
    for part in ("#columns [data-testid=bot]", "#columns .figures li", "#status p", "#message textarea"):
        assert contrast(visitor.tab, part) >= 4.5
    visitor.picture("dark")


def contrast(tab: Any, selector: str) -> float:
    """The contrast of a text to what is behind it (WCAG 2.2, 1.4.3 asks for 4.5)."""
    colours = tab.evaluate(
        """(selector) => { const part = document.querySelector(selector); let behind = part, found = null;
        while (behind && !found) { const c = getComputedStyle(behind).backgroundColor;
          if (!/, 0\\)$|transparent/.test(c)) found = c; behind = behind.parentElement; }
        return [getComputedStyle(part).color, found ?? getComputedStyle(document.body).backgroundColor]; }""",
        selector,
    )
    lights = []
    for colour in colours:
        channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_every_control_has_a_name(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.ask("How do I keep basil alive?")
    for accordion in ("settings", "extras"):
        visitor.tab.click(f"#{accordion} button")
    nameless = visitor.tab.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, a[href]")]
        .filter((e) => e.checkVisibility() && !(e.innerText?.trim() || e.getAttribute("aria-label") || e.title
          || e.labels?.length || e.getAttribute("aria-labelledby")))
        .map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert visitor.tab.locator("#status [role=status][aria-live=polite]").count() == 1
    logs = visitor.tab.locator("#columns [role=log]")
    named = [f"conversation with {arm}" for arm in ARMS]
    assert eventually(lambda: [log.get_attribute("aria-label") for log in logs.all()] == named)
    assert {log.get_attribute("aria-live") for log in logs.all()} == {"off"}


def test_a_closed_tab_frees_its_slot(visit: Callable[..., Visitor], served: Served) -> None:
    visitor = visit()
    with served.held():
        visitor.ask("Tell me a very long story about a ship.", settle=False)
        assert eventually(lambda: served.comparison.under_way == 1)
        visitor.tab.close()
    assert served.waits_until_idle()
    other = visit()
    other.ask("Is it my turn?")
