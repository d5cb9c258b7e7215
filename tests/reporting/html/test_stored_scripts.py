"""What data and models say is shown, never run: with the page's policy and without it."""

import json

import pytest

from bench.records import AppliedMethod, Store
from bench.reporting.html import write_report
from tests.reporting.html.synthetic_records import record, samples

EVIL = (
    "<script>window.ran=1</script>"
    "<img src=x onerror='window.ran=2'>"
    "</script><script>window.ran=3</script>"
    '"><svg onload=window.ran=4>{{7*7}}\u2028javascript:window.ran=5'
)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A report in which everything that comes from outside is an attack."""
    root = tmp_path_factory.mktemp("poisoned")
    store = Store(root)
    dense = record(0)
    plain = record(1, method="camera_p")
    method = AppliedMethod(
        name=EVIL, config={EVIL: EVIL}, effect=EVIL, seconds=1.0,
        report={EVIL: [EVIL], "history": [{"epoch": n, EVIL: n} for n in (1, 2)]},
    )  # fmt: skip
    first = plain.metrics[1].model_copy(update={"task": EVIL, "metric": EVIL, "filter": EVIL})
    bad = plain.model_copy(
        update={
            "command": EVIL,
            "sweep": EVIL,
            "methods": (method,),
            "metrics": (plain.metrics[0], first, *plain.metrics[2:]),
            "environment": {"platform": EVIL},
            "costs": (*plain.costs, plain.costs[0].model_copy(update={"scope": EVIL})),
        }
    )
    for one in (dense, bad):
        rows = samples(one, 2, prompt=EVIL)
        for row in rows:
            row.update(target=EVIL, choices=[EVIL, "b"], response=EVIL)
        store.write(one, rows, "")
    (store.runs / "broken").mkdir()
    (store.runs / "broken" / "record.json").write_text('{"schema_version": "' + EVIL[:40] + '"}')
    trial = {"run": bad.id, "state": "complete", "front": True, "values": [1.0, 2.0],
             "params": {EVIL: EVIL}}  # fmt: skip
    search = {"study": EVIL, "objectives": {EVIL: "maximize", "flops": "minimize"},
              "trials": [trial, {**trial, "values": [0.5, 3.0], "front": False}]}  # fmt: skip
    (root / "sweeps" / "evil").mkdir(parents=True)
    (root / "sweeps" / "evil" / "study.json").write_text(json.dumps(search))
    return write_report(root).path, bad


@pytest.mark.broad
@pytest.mark.parametrize("bypass_csp", [False, True], ids=["policy", "escaping alone"])
def test_stored_scripts_are_text(visit, poisoned, bypass_csp):
    path, bad = poisoned
    opened = visit(path, bypass_csp=bypass_csp)
    pages = ("#/", "#/leaderboard?setting=0&tasks=1", "#/pareto", "#/searches", f"#/run/{bad.id}")
    for address in pages:
        page = opened.open(address)
        if "searches" in address:
            page.get_by_role("table").wait_for()
            page.wait_for_selector(".figure svg")
        if "run" in address:
            page.wait_for_selector(".sample")
            for summary in page.locator("summary").all():
                summary.click()
            assert "<script>window.ran=1</script>" in page.locator(".command").inner_text()
            assert "onerror" in page.locator(".sample").first.inner_text()
        page.wait_for_timeout(150)
        assert page.evaluate("window.ran") is None, address
        assert page.locator("main img, main script, main svg[onload]").count() == 0


def test_an_inline_script_that_got_in_anyway_is_refused(chromium, poisoned):
    """The policy is a second wall: it stops what escaping would have let through."""
    page = chromium.new_page()
    page.goto(poisoned[0].as_uri())
    page.wait_for_selector("main h1")
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.ran=6>')"
    )
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran=7';"
        " document.body.append(s); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    page.close()
