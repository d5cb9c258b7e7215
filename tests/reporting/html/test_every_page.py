"""What holds for every page of the report: it fits, it can be read aloud, it prints."""

import pytest

from bench.reporting.html import write_report
from tests.reporting.html.synthetic_records import fill, paper_table, write_search

UNNAMED = """() => {
  const label = element => [
    element.getAttribute("aria-label"), element.getAttribute("alt"), element.innerText,
    ...[...(element.labels ?? [])].map(one => one.innerText),
    element.caption?.innerText,
  ].filter(Boolean).join("").trim();
  const asked = "a[href], button, select, input, summary, img, table, .figure svg, [role]";
  return [...document.querySelectorAll(asked)]
    .filter(element => !element.closest("[aria-hidden=true]") && !element.closest("svg svg"))
    .filter(element => !label(element))
    .map(element => element.outerHTML.slice(0, 120));
}"""
"""The controls, pictures and tables of a page that a screen reader could not name."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with every kind of page; return its file and the pages' addresses."""
    root = tmp_path_factory.mktemp("every")
    records = fill(root, 5, per_task=4, models=("tiny",))
    write_search(root, "front", records)
    written = write_report(root, tables=lambda _: [paper_table(records[1].id)])
    pages = [
        "#/", "#/leaderboard?setting=0&tasks=1", "#/pareto", "#/searches", "#/tables",
        f"#/compare?runs={records[0].id},{records[2].id}", f"#/run/{records[3].id}",
    ]  # fmt: skip
    return written.path, pages


def settled(opened, address):
    """Open a page and wait until nothing is left to unpack."""
    page = opened.open(address)
    page.wait_for_function("() => !document.querySelector('main').innerText.includes('Loading')")
    page.wait_for_timeout(150)  # figures are drawn once their width is known
    return page


@pytest.mark.broad
@pytest.mark.parametrize("width", [390, 768, 1400])
def test_it_fits_and_everything_has_a_name(visit, report, width):
    path, pages = report
    opened = visit(path, viewport={"width": width, "height": 900})
    for address in pages:
        page = settled(opened, address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        assert page.evaluate(UNNAMED) == [], address


@pytest.mark.broad
def test_it_prints_dark_on_white_without_controls(visit, report):
    path, pages = report
    opened = visit(path, color_scheme="dark")
    # One page with filters and a wide table, and the one with figures, samples and code.
    for address in (pages[1], pages[-1]):
        page = settled(opened, address)
        page.emulate_media(media="print")
        assert page.locator("header.top").is_hidden()
        assert page.locator(".filters:visible, .plain-button:visible, .pages:visible").count() == 0
        style = "getComputedStyle(document.body)"
        assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
        clipped = "() => [...document.querySelectorAll('.scroll')].filter(one => "
        clipped += "getComputedStyle(one).overflowX !== 'visible').length"
        assert page.evaluate(clipped) == 0
        page.emulate_media(media="screen")
