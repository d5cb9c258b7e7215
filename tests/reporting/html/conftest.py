"""A real Chromium for the report's tests: the distribution's own, driven by Playwright.

Where it is missing the tests say so and skip; where BENCH_BROWSER=required (CI) they fail instead.
"""

import os

import pytest

from tests.reporting.html.browser import launch, program

PATIENCE = 60_000
"""Milliseconds before a test gives up: a busy machine is slow, not wrong."""


def missing(what):
    reason = f"{what} is missing: apt-get install chromium, pip install -e '.[dev]'"
    if os.environ.get("BENCH_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium():
    """The browser, for one module: Playwright's event loop must not run beside other tests."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    if program() is None:
        missing("Chromium")
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


class Visit:
    """One page on a report file, with all that it complained about or asked a network for."""

    def __init__(self, browser, file, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.file = file
        self.complaints, self.requests = [], []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._heard)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, address="#/"):
        self.page.goto("about:blank")
        self.page.goto(self.file.as_uri() + address)
        self.page.wait_for_selector("main h1")
        return self.page

    def close(self):
        self.context.close()


@pytest.fixture
def visit(chromium):
    """Open report files; a page that complains or asks a network for anything fails its test."""
    visits = []

    def start(file, **options):
        visits.append(Visit(chromium, file, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.close()
        assert one.complaints == []
        asked = [url for url in one.requests if not url.startswith(("file:", "data:", "about:"))]
        assert asked == []
