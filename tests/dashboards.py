"""A real dashboard, and a real browser that looks at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright

from tests.deadlines import seconds
from tests.launching import Process, start

DASHBOARD = [sys.executable, "-m", "hvd_train", "dashboard"]


@contextlib.contextmanager
def dashboard(runs: Path) -> Iterator[tuple[Process, str]]:
    """A dashboard of a folder of runs, and its address."""
    with start([*DASHBOARD, str(runs)]) as process:
        yield process, address(process)


def address(process: Process) -> str:
    """What a dashboard prints first."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("dashboard  http://127.0.0.1:"):
        pytest.fail(f"{line}{process.communicate(timeout=seconds(30))}")
    return line.split()[1]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser; the test is skipped where there is none."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is not installed: `apt install chromium`")
    args = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=args)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """Pages of one address, of which every request is recorded."""

    def __init__(self, context: BrowserContext, base: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(1000 * seconds(60))
        self.requested: list[str] = []
        self.errors: list[str] = []
        self._base = base
        context.on("request", self._record)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)

    def _record(self, request: Request) -> None:
        self.requested.append(request.url)

    def open(self, path: str, drawn: bool = True) -> Page:
        """A page, with its charts where it has any."""
        self.page.goto(self._base + path)
        if drawn:
            self.page.wait_for_selector("html[data-drawn]", state="attached")
        return self.page

    def elsewhere(self) -> list[str]:
        """Requests that left this host."""
        inside = ("data", "blob", "about")
        urls = [url for url in self.requested if urlsplit(url).scheme not in inside]
        return [url for url in urls if urlsplit(url).hostname != "127.0.0.1"]

    def wait(self, condition: str) -> None:
        """Until an expression is true in the page."""
        self.page.wait_for_function(f"() => {condition}")

    def points(self, chart: str) -> int:
        """Points of the first line of a chart."""
        found: int = self.page.evaluate(f"document.getElementById('chart-{chart}').calcdata[0].length")
        return found

    def texts(self, chart: str, of: str) -> list[str]:
        """What is written in a chart: its `legendtext`, `annotation-text`, or `ytick`."""
        return [text.strip() for text in self.page.locator(f"#chart-{chart} .{of}").all_text_contents()]


def visit(browser: Browser, base: str, **options: object) -> Visit:
    """A browser's window of its own: `color_scheme`, `viewport` and other options of Playwright."""
    return Visit(browser.new_context(**options), base)  # type: ignore[arg-type]
