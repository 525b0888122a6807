"""The demo's page as a visitor sees it: what a person would look at and click."""

from __future__ import annotations

import os
from typing import Any

import pytest
from served_page import eventually

playwright = pytest.importorskip("playwright.sync_api")


class Visitor:
    """A tab with the page in it, and what a person would look at and click."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.outside: list[str] = []
        self.troubles: list[str] = []
        tab.on("request", lambda request: self.outside.append(request.url))
        tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        tab.on("dialog", lambda dialog: self.troubles.append(f"dialog: {dialog.message}"))

    def open(self, url: str) -> Visitor:
        self.tab.goto(url)
        self.tab.wait_for_selector("#message textarea")
        playwright.expect(self.tab.locator("#status")).to_contain_text("Ready")
        return self

    def ask(self, text: str, settle: bool = True) -> None:
        before = len(self.texts("user")[0])
        self.tab.fill("#message textarea", text)
        self.tab.press("#message textarea", "Enter")
        if settle:
            assert eventually(lambda: len(self.texts("user")[0]) == before + 1)
            self.wait_for("All answers are there")

    def wait_for(self, text: str) -> None:
        playwright.expect(self.tab.locator("#status")).to_contain_text(text, timeout=60_000)

    def set(self, label: str, value: str) -> None:
        if not self.tab.get_by_label("System prompt").is_visible():
            self.tab.click("#settings button")
        box = self.tab.get_by_label(label, exact=False).last

        def stays() -> bool:  # a panel that has just opened may put its first value back
            box.fill(value)
            box.blur()
            self.tab.wait_for_timeout(500)
            return bool(box.input_value() == value)

        assert eventually(stays, seconds=60)

    def click(self, name: str) -> None:
        self.tab.click(f"#{name}")

    def texts(self, who: str = "bot") -> list[list[str]]:
        """The messages of each column, as they stand in the page."""
        columns = range(self.tab.locator("#columns .arm").count())
        return [self.tab.locator(f"#chat_{i} [data-testid={who}]").all_text_contents() for i in columns]

    def labels(self) -> list[str]:
        found = self.tab.locator("#columns [data-testid=block-label]").all_inner_texts()
        return [text.strip() for text in found]

    def figures(self) -> list[str]:
        """The figures of each column's last answer."""
        columns = range(self.tab.locator("#columns .arm").count())
        lines = [self.tab.locator(f"#figures_{i} li").all_inner_texts() for i in columns]
        return [column[0] if column else "" for column in lines]

    def picture(self, name: str) -> None:
        if folder := os.environ.get("LORA_RLHF_SCREENSHOTS"):
            self.tab.screenshot(path=f"{folder}/{name}.png", full_page=True)
