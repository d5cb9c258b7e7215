"""Pictures of the report's pages, to look at: `python -m tests.reporting.html.screenshots RESULTS`.

They are drawn by the Chromium of the tests, at the widths of a desktop and of a phone.
"""

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from bench.records import Store
from bench.reporting.html import write_report
from tests.reporting.html.browser import launch

WIDTHS = {"1400": {"width": 1400, "height": 900}, "390": {"width": 390, "height": 844}}


def pages(results_dir):
    """The addresses of the report's pages, by name."""
    records = Store(results_dir).all()
    dense = next((r for r in records if r.is_dense), records[0])
    others = [r for r in records if r.id != dense.id]
    compared = ",".join(r.id for r in [dense, *others[:3]])
    return {
        "overview": "#/",
        "leaderboard": "#/leaderboard?setting=0",
        "pareto": "#/pareto",
        "compare": f"#/compare?runs={compared}",
        "searches": "#/searches",
        "tables": "#/tables",
        "run": f"#/run/{(others or records)[-1].id}",
    }


def take(results_dir, folder, only=None, widths=WIDTHS, scheme="light", whole=True):
    """Write one picture per page and width into `folder`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        file = write_report(results_dir, Path(place) / "report.html").path
        browser = launch(playwright)
        for width, viewport in widths.items():
            context = browser.new_context(viewport=viewport, color_scheme=scheme)
            page = context.new_page()
            for name, address in pages(results_dir).items():
                if only is not None and name not in only:
                    continue
                page.goto("about:blank")
                page.goto(file.as_uri() + address)
                page.wait_for_selector("main h1")
                page.wait_for_timeout(400)  # figures are drawn once their width is known
                written.append(folder / f"{name}-{width}.png")
                page.screenshot(path=written[-1], full_page=whole)
            context.close()
        browser.close()
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a results folder")
    parser.add_argument("folder", type=Path, nargs="?", help="where the pictures go")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="only the README's picture")
    given = parser.parse_args()
    if given.readme is not None:
        desktop = {"1400": {"width": 1400, "height": 860}}
        with tempfile.TemporaryDirectory() as place:
            (picture,) = take(given.results, Path(place), ["overview"], desktop, whole=False)
            given.readme.parent.mkdir(parents=True, exist_ok=True)
            given.readme.write_bytes(picture.read_bytes())
        print(f"wrote {given.readme}")
        return
    for file in take(given.results, given.folder or given.results / "screenshots"):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
