"""The report in a real browser: sorting, filtering, opening a run, keys, colours, phone."""

import pytest

from bench.reporting.html import write_report
from tests.reporting.html.synthetic_records import fill

PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    root = tmp_path_factory.mktemp("ten")
    records = fill(root, 10, models=("tiny",))
    return write_report(root).path, records


@pytest.fixture(scope="module")
def thousands(tmp_path_factory):
    root = tmp_path_factory.mktemp("thousands")
    records = fill(root, 5000, per_task=0)
    return write_report(root).path, records


def labels(page):
    return page.locator("table.grid tbody th").all_inner_texts()


def numbers(page, title):
    texts = page.locator(f'table.grid td[data-title="{title}"]').all_inner_texts()
    return [float(text.split()[0].replace("×", "")) for text in texts if text[0].isdigit()]


@pytest.mark.broad
def test_columns_sort_both_ways(visit, ten):
    page = visit(ten[0]).open("#/leaderboard")
    assert len(labels(page)) == 10
    page.get_by_role("button", name="Score").click()
    assert page.locator('th[aria-sort="descending"]').inner_text().startswith("Score")
    falling = numbers(page, "Score")
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) > 5
    page.get_by_role("button", name="Score").click()
    assert numbers(page, "Score") == falling[::-1]
    page.get_by_role("button", name="Method").click()
    assert labels(page) == sorted(labels(page))


@pytest.mark.broad
def test_filters_narrow_and_the_address_keeps_them(visit, ten):
    opened = visit(ten[0])
    page = opened.open("#/leaderboard")
    page.get_by_label("Search").fill("camera_p")
    page.get_by_role("status").filter(has_text="of 10").wait_for()
    assert set(labels(page)) == {"camera_p 0.1"}
    assert "q=camera_p" in page.url
    kept = page.url.partition("#")[2]
    page = opened.open("#" + kept)
    assert set(labels(page)) == {"camera_p 0.1"}
    page.get_by_role("link", name="Clear filters").click()
    page.get_by_role("status").filter(has_text="10 runs").wait_for()
    page.locator(".filters").get_by_label("Weights").select_option("zeroed")
    assert {text.split()[0] for text in labels(page)} == {"random_experts", "magnitude"}
    # Weights that are only zeroed show no time.
    assert numbers(page, "Time") == []


def test_a_run_shows_its_command_scores_costs_and_samples(visit, ten):
    path, records = ten
    opened = next(one for one in records if one.methods and one.methods[0].name == "naee")
    page = visit(path).open("#/leaderboard")
    page.get_by_role("link", name=opened.label).click()
    page.wait_for_selector(".samples")
    assert page.locator("h1").inner_text().strip() == opened.label
    assert page.locator(".command code").inner_text() == opened.command
    scores = page.get_by_role("table", name="Headline scores").locator("tbody tr")
    assert scores.count() == len(opened.metrics)
    assert f"{opened.metrics[0].value * 100:.1f}" in scores.first.inner_text()
    assert "GFLOP" in page.get_by_role("table", name="Costs").inner_text()
    shown = page.locator(".sample").count()
    assert shown == 10
    page.get_by_label("Outcome").select_option("wrong")
    assert 0 < page.locator(".verdict.wrong").count() == page.locator(".sample").count()
    page.get_by_text("Config", exact=True).click()
    assert "limit: null" in page.locator("details[open] .yaml").inner_text()
    page.go_back()
    assert page.locator("h1").inner_text() == "Leaderboard"


def test_everything_works_by_keyboard(visit, ten):
    page = visit(ten[0]).open("#/leaderboard?sort=method")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    page.wait_for_selector("#search:focus")
    page.get_by_role("button", name="Score").focus()
    page.keyboard.press("Enter")
    assert page.locator('th[aria-sort="descending"]').count() == 1
    page.locator("table.grid tbody a").first.focus()
    page.keyboard.press("ArrowDown")
    second = labels(page)[1]
    assert page.evaluate("document.activeElement.innerText") == second
    page.keyboard.press("Enter")
    page.wait_for_selector(".command")
    assert page.locator("h1").inner_text().strip() == second
    assert page.evaluate("document.activeElement.id") == "main"


def test_the_pareto_plot_marks_the_front_and_answers_the_pointer(visit, ten):
    path, records = ten
    page = visit(path).open("#/pareto")
    page.wait_for_selector(".figure svg")
    front = page.get_by_role("table", name="Runs on the Pareto front").locator("tbody tr")
    assert front.count() == len(brute_force_front(records))
    assert page.locator('.figure svg a[*|href^="#/run/"]').count() == front.count()
    star = page.locator(".figure svg [aria-label=dot] path").last.bounding_box()
    page.mouse.move(star["x"] + star["width"] / 2, star["y"] + star["height"] / 2)
    page.wait_for_selector(".figure svg [aria-label=tip] text")
    assert "run " in page.locator(".figure svg [aria-label=tip]").text_content()
    page.get_by_label("Cost (across)").select_option("forward 1x512 seconds")
    assert "a time that could be a gain" in page.locator(".note").inner_text()
    page.get_by_role("button", name="dense").click()
    assert page.get_by_role("button", name="dense").get_attribute("aria-pressed") == "false"


def brute_force_front(records):
    """Runs with a real saving that no other such run equals or beats in both."""
    points = [
        (r.cost("flops", "forward 1x512").value, r.metric("average").value, r.id)
        for r in records
        if not r.methods or r.methods[0].effect not in ("zeroed", "masked")
    ]

    def beaten(one):
        return any(
            other[2] != one[2] and other[0] <= one[0] and other[1] >= one[1] for other in points
        )

    return [point for point in points if not beaten(point)]


@pytest.mark.broad
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_the_reader_chooses(visit, ten, scheme):
    page = visit(ten[0], color_scheme=scheme).open()

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def is_dark():
        return int(paper().removeprefix("rgb(").split(",")[0]) < 60

    assert is_dark() == (scheme == "dark")
    page.locator("button.theme").click()
    assert not is_dark()
    page.locator("button.theme").click()
    assert is_dark()
    page.reload()
    page.wait_for_selector("main h1")
    assert is_dark()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper(visit, ten, scheme):
    """Contrast of at least 4.5 (WCAG AA) for the text colours, on every background they meet."""
    page = visit(ten[0], color_scheme=scheme).open()
    names = ["paper", "surface", "sunk", "ink", "quiet", "accent", "right", "wrong"]
    colours = page.evaluate(
        "names => { const style = getComputedStyle(document.documentElement);"
        " return names.map(name => style.getPropertyValue('--' + name).trim()); }",
        names,
    )
    light = {name: luminance(colour) for name, colour in zip(names, colours, strict=True)}
    for text in ("ink", "quiet", "accent", "right", "wrong"):
        for ground in ("paper", "surface", "sunk"):
            high, low = sorted((light[text], light[ground]), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text, ground)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phone_sorts_by_a_select(visit, ten):
    opened = visit(ten[0], viewport=PHONE)
    page = opened.open("#/leaderboard")
    page.get_by_label("Sort by").select_option("-retention")
    kept = numbers(page, "Kept")
    assert kept == sorted(kept, reverse=True)
    page.locator("table.grid tbody a").first.click()
    page.wait_for_selector(".command")


@pytest.mark.broad
def test_five_thousand_runs_are_paged_sorted_and_opened(visit, thousands):
    path, records = thousands
    page = visit(path).open("#/leaderboard")
    assert page.get_by_role("status").inner_text() == "5,000 runs"
    assert len(labels(page)) == 50
    # What is kept of dense decides the order, since scores of several settings differ in meaning.
    assert page.locator('th[aria-sort="descending"]').inner_text().startswith("Kept")
    best = numbers(page, "Kept")
    assert best == sorted(best, reverse=True)
    page.get_by_role("button", name="Next").click()
    assert numbers(page, "Kept")[0] <= best[-1]
    oldest = records[3]
    page.get_by_label("Search").fill(oldest.id)
    page.get_by_role("status").filter(has_text="1 run of 5,000").wait_for()
    page.locator("table.grid tbody a").click()
    page.wait_for_selector(".command")
    assert page.locator(".command code").inner_text() == oldest.command
    page.goto(path.as_uri() + "#/pareto")
    page.wait_for_selector(".figure svg")
    assert page.locator(".figure svg [aria-label=dot] path").count() > 1000


@pytest.mark.broad
def test_no_runs_is_said_and_shows_a_first_command(visit, tmp_path):
    opened = visit(write_report(tmp_path).path)
    assert "bench run" in opened.open().locator("main").inner_text()
    for address in ("#/leaderboard", "#/pareto", "#/tables", "#/run/none", "#/elsewhere"):
        assert opened.open(address).locator("h1").count() == 1
