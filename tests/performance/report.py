"""How soon a report of five thousand runs opens in Chromium, and how large it is."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from bench.reporting.html import write_report
from tests.performance.figure import Figure
from tests.reporting.html.browser import launch, program
from tests.reporting.html.synthetic_records import fill

RUNS, ROUNDS = 5000, 5
SHOWN = {"#/": ".card h2", "#/leaderboard": "table.grid tbody tr", "#/pareto": ".figure svg"}
"""What of each page must be there before it counts as open."""


def figures() -> list[Figure]:
    """Seconds from the address to what is read there, for each page; the file's size."""
    if program() is None:
        raise SystemExit("the report is opened in Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        fill(Path(folder), RUNS, per_task=0)
        began = time.perf_counter()
        written = write_report(Path(folder))
        built = time.perf_counter() - began
        browser = launch(playwright)
        opened = [_opened(browser, written.path, page) for page in SHOWN]
        browser.close()
    size = written.bytes / 1e6
    return [
        *opened,
        Figure("report of 5,000 runs, MB", size, "<= 10", size <= 10, f"written in {built:.1f} s"),
    ]


def _opened(browser: Any, file: Path, address: str) -> Figure:
    took = []
    for _ in range(ROUNDS):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        began = time.perf_counter()
        page.goto(file.as_uri() + address)
        page.wait_for_selector(SHOWN[address])
        took.append(time.perf_counter() - began)
        page.close()
    best, middle = min(took), sorted(took)[ROUNDS // 2]
    how = f"{RUNS:,} runs, fastest of {ROUNDS}, median {middle:.2f} s"
    return Figure(f"report opens at {address}", best, "<= 2 s", best <= 2, how)
