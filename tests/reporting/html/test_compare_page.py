"""The page that compares runs, against `bench compare` on the same records."""

import re

import pytest

import bench
from bench.records import Store
from bench.reporting.html import write_report
from bench.reporting.html.samples import packed_outcomes, readable_table
from tests.reporting.html.synthetic_records import TASKS, record, samples

SMALL_COUNT = 60


def write_true(root, number, method):
    """A run whose numbers are the means of its samples, as real ones are."""
    made = record(number, method=method)
    rows = samples(made, SMALL_COUNT)
    means = {
        task: sum(row["acc"] for row in rows if row["task"] == task) / SMALL_COUNT for task in TASKS
    }
    values = {"average": sum(means.values()) / len(means), **means}
    metrics = tuple(m.model_copy(update={"value": values[m.task], "n": SMALL_COUNT})
                    for m in made.metrics)  # fmt: skip
    made = made.model_copy(update={"metrics": metrics})
    Store(root).write(made, rows, "")
    return made


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    made = [write_true(root, at, method) for at, method in enumerate((None, "naee", "camera_p"))]
    return root, made, write_report(root).path


def numbers(text):
    return [float(word) for word in re.findall(r"[-+−]?\d+\.?\d*", text.replace("−", "-"))]


@pytest.mark.broad
def test_differences_are_those_of_bench_compare(visit, three):
    root, (dense, naee, camera), path = three
    page = visit(path).open(f"#/compare?runs={dense.id},{naee.id},{camera.id}")
    table = page.get_by_role("table", name="Differences to dense")
    table.wait_for()
    expected = {(row.run, row.task): row for row in
                bench.compare([dense, naee, camera], results_dir=root).contrasts}  # fmt: skip
    lines = table.locator("tbody tr").all()
    assert len(lines) == len(TASKS) + 1
    for line, task in zip(lines, ("average", *TASKS), strict=True):
        for run, cell in zip((naee, camera), line.locator("td").all()[1:], strict=True):
            row = expected[run.id, task]
            small = cell.locator("small")
            difference, low, high, *changed = numbers(small.inner_text())
            assert difference == pytest.approx(100 * row.difference, abs=0.051)
            # A normal interval here, a bootstrap there.
            assert low == pytest.approx(100 * row.low, abs=2.5)
            assert high == pytest.approx(100 * row.high, abs=2.5)
            if task != "average":
                assert changed == [row.gained, -row.lost]
                p, corrected = numbers(small.locator("span").first.get_attribute("title"))
                assert p == pytest.approx(row.p, rel=0.06)
                assert corrected == pytest.approx(row.p_holm, rel=0.06)
    assert page.locator(".figure svg [aria-label=dot] path").count() == 2 * len(lines)
    costs = page.get_by_role("table", name="Costs side by side").inner_text()
    assert "GFLOP" in costs


def test_runs_are_chosen_and_the_address_keeps_them(visit, three):
    _, (dense, naee, camera), path = three
    page = visit(path).open("#/compare")
    table = page.get_by_role("table", name="Differences to dense")
    table.wait_for()
    assert table.locator("thead th").count() == 4
    page.get_by_role("button", name=naee.label).click()
    page.wait_for_url(f"**runs={dense.id}%2C{camera.id}*")
    assert table.locator("thead th").count() == 3
    page.locator(".filters").get_by_label("Baseline").select_option(camera.id)
    page.get_by_text("Choose up to").wait_for()
    page.get_by_role("button", name="dense").click()
    page.get_by_role("table", name=f"Differences to {camera.label}").wait_for()


def test_a_number_that_its_samples_do_not_give_is_not_paired(three):
    root, (dense, *_), _ = three
    table = readable_table(Store(root).folder(dense.id) / "samples.parquet")
    assert set(packed_outcomes(table, dense)) == set(TASKS)
    wrong = dense.metrics[1].model_copy(update={"value": dense.metrics[1].value + 1e-3})
    changed = dense.model_copy(update={"metrics": (dense.metrics[0], wrong, *dense.metrics[2:])})
    assert set(packed_outcomes(table, changed)) == set(TASKS[1:])


@pytest.mark.sample(1)
@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_runs_off_the_page(visit, three, width):
    _, _, path = three
    page = visit(path, viewport={"width": width, "height": 900}).open("#/compare")
    page.get_by_role("table", name="Costs side by side").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
