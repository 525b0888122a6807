"""The real page, served on this machine, on the tiny run or the one that LORA_RLHF_DEMO_RUN names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo's extra is not installed")

from lora_rlhf_demo.page import chat_page, launch_options
from served_page import Served

from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.chat.loading import run_comparison

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def demo_run(request: pytest.FixtureRequest) -> Path:
    named = os.environ.get("LORA_RLHF_DEMO_RUN")
    return Path(named) if named else request.getfixturevalue("whole_run")[0]


@pytest.fixture(scope="session")
def demo_comparison(demo_run: Path) -> ChatComparison:
    return run_comparison(demo_run, context=1024, most_tokens=96)


@pytest.fixture(scope="session")
def serve(demo_comparison: ChatComparison) -> Iterator[Callable[..., Served]]:
    """Serve a page; all are closed at the end."""
    pages: list[Any] = []

    def start(votes: Path, report: Path | None = None, waiting: int = 64, **options: Any) -> Served:
        page = chat_page(demo_comparison, votes, report, waiting)
        pages.append(page)
        page.queue(max_size=waiting)
        app, url, _ = page.launch(
            **launch_options(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **options
        )
        return Served(url, app, demo_comparison, votes)

    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="session")
def served(serve: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("demo")
    report = folder / "report.html"
    report.write_text("<html><body>the evaluation</body></html>", encoding="utf-8")
    return serve(folder / "votes.jsonl", report)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    from visitor import Visitor

    visitors: list[Any] = []

    def open_page(address: str = "", url: str | None = None, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        visitors.append(Visitor(context.new_page()))
        return visitors[-1].open((url or served.url) + address)

    yield open_page
    for visitor in visitors:
        visitor.tab.context.close()
        assert visitor.troubles == []
        assert [url for url in visitor.outside if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert served.waits_until_idle()
