"""The page of searches: best values, the front, and trials that lead to their runs."""

import pytest

from bench.reporting.html import write_report
from tests.reporting.html.synthetic_records import fill, write_search


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    root = tmp_path_factory.mktemp("searched")
    records = fill(root, 8, per_task=0, models=("tiny",))
    study = write_search(root, "tiny front", records)
    return write_report(root).path, records, study


@pytest.mark.broad
def test_a_search_shows_its_best_values_and_its_front(visit, searched):
    path, records, study = searched
    page = visit(path).open("#/searches")
    front = page.get_by_role("table", name="Trials on the front").locator("tbody tr")
    front.first.wait_for()
    best = sorted((t for t in study["trials"] if t["front"]), key=lambda t: -t["values"][0])
    assert front.count() == len(best) > 1
    for row, trial in zip(front.all(), best, strict=True):
        cells = [row.locator("th").inner_text(), *row.locator("td").all_inner_texts()]
        assert cells[0] == str(trial["trial"])
        # In percent and with the unit of the cost, as everywhere else in the report.
        assert cells[1] == f"{trial['values'][0] * 100:.1f}"
        assert cells[2].endswith("FLOP")
    assert "10 trials, 8 complete, 1 stopped early, 1 failed" in page.locator(".lead").inner_text()
    progress = page.locator(".curves figure")
    assert progress.count() == 2
    for figure in progress.all():
        assert figure.locator("svg [aria-label=dot] circle").count() == len(records)
        assert figure.locator("svg [aria-label=line] path").count() == 1
    # The front can be reached and opened with keys alone.
    points = page.locator('.figure svg a[*|href^="#/run/"]')
    assert points.count() == len(best)
    points.first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".command")
    page.get_by_role("link", name="tiny front").click()
    page.get_by_role("heading", name="Searches").wait_for()


@pytest.mark.broad
def test_a_report_without_searches_has_no_page_of_them(visit, tmp_path):
    fill(tmp_path, 2, per_task=0, models=("tiny",))
    opened = visit(write_report(tmp_path).path)
    assert opened.open().get_by_role("link", name="Searches").count() == 0
    assert "sweep=camera_p_pareto" in opened.open("#/searches").locator("main").inner_text()
