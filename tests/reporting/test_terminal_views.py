"""`bench show`, `bench ls` and a search on a terminal: all that a record says, and nothing else."""

import pytest

from bench.records import Cost, Store
from bench.reporting.comparison.comparison import Comparison
from bench.reporting.comparison.contrast import Contrast
from bench.reporting.comparison.printer import print_comparison
from bench.reporting.record_numbers import differing_settings
from bench.reporting.summary import print_summary
from bench.reporting.tables.writers import print_table
from bench.reporting.terminal_views import list_runs, print_record, shown_runs
from tests.reporting.html.synthetic_records import paper_table, record

COMMAND = "bench run 'benchmark.tasks=[arc_easy]' method=[camera_p,gptq] model.path=/[bold]x[/]"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def bracketed():
    """A run with text from outside in brackets, which rich would read as its own tags."""
    one = record(1, method="naee", command=COMMAND)
    method = one.methods[0].model_copy(
        update={"name": "[red]prune[/red]", "config": {"ratio": 0.4, "keys": "[a,b] [/x]"}}
    )
    latency = Cost(
        scope="prefill 1x9", quantity="latency", unit="s", value=0.1, how="measured",
        parts={"p10": 0.1, "p50": 0.1, "p90": 0.1}, note="loaded by [/other]",
    )  # fmt: skip
    model = one.model.model_copy(update={"name": "[m]", "source": "/models/[dim]m"})
    return one.model_copy(
        update={"methods": (method,), "model": model, "costs": (*one.costs, latency)}
    )


def test_a_record_is_shown_letter_by_letter(bracketed, capsys):
    print_record(bracketed)
    out = capsys.readouterr().out
    assert f"command: {COMMAND}" in out
    assert "[red]prune[/red] 0.4" in out
    assert "keys=[a,b] [/x]" in out
    assert "/models/[dim]m" in out
    assert "* loaded by [/other]" in out


def test_labels_in_titles_and_headings_are_no_markup(bracketed, capsys):
    print_summary([bracketed])
    out = capsys.readouterr().out
    assert "[m] on nine" in out
    assert "[red]prune[/red]" in out
    contrast = Contrast(
        bracketed.id, "[boolq]", "acc", "none", True, 9, 0.5, 0.5, 0.0, low=-0.1, high=0.1,
        note="[i]why",
    )  # fmt: skip
    print_comparison(Comparison(record(0), (bracketed,), (contrast,), ("refused [x]",)))
    out = capsys.readouterr().out
    assert "[red]prune[/red] 0.4 against dense" in out
    assert "+0.0 [-10.0, +10.0]" in out
    assert "[boolq]: [i]why" in out
    assert "refused [x]" in out


def test_a_tables_names_are_no_markup(capsys):
    from dataclasses import replace

    table = paper_table("a" * 12)
    lines = tuple(replace(line, section="[sec]", name="[b]CAMERA") for line in table.lines)
    print_table(replace(table, lines=lines, title="[t] Main"))
    out = capsys.readouterr().out
    for text in ("[sec]", "[b]CAMERA", "[t] Main", "not subtracted [1]"):
        assert text in out


def test_a_list_of_runs_fits_a_terminal(tmp_path):
    def row(run, note=None):
        return {
            "run": run, "started": "2026-11-29T20:04:32.490+00:00", "model": "m", "method": "rtn",
            "benchmark": "b", "average": 2 / 3, "score": "66.7 %", "note": note,
        }  # fmt: skip

    first, _ = shown_runs([row("ac71c40185c6"), row("9b61cca2e97c")], Store(tmp_path))
    assert first == {
        "run": "ac71c401", "started": "11-29 20:04", "model": "m", "method": "rtn",
        "benchmark": "b", "score": "66.7 %",
    }  # fmt: skip
    # A note, and digits that do not tell two runs apart, stay whole.
    alike = [row("ac71c40185c6", "untrained"), row("ac71c401ffff")]
    assert [each["run"] for each in shown_runs(alike, Store(tmp_path))] == [
        "ac71c40185c6",
        "ac71c401ffff",
    ]
    assert shown_runs(alike, Store(tmp_path))[0]["note"] == "untrained"
    broken = {**row("x", "unreadable: torn"), "started": None}
    assert shown_runs([broken], Store(tmp_path))[0]["started"] is None


def test_runs_of_one_name_are_listed_with_what_tells_them_apart(tmp_path):
    store, first = Store(tmp_path), record(1)
    runs = [first, record(2)]
    for place, run in enumerate(runs):
        limit = {**first.config["benchmark"], "limit": 2 + place}
        config = {**first.config, "benchmark": limit, "results_dir": f"r{place}"}
        kept = {"config": config, "methods": first.methods, "model": first.model}
        store.write(run.model_copy(update=kept), [], "")
    rows = shown_runs(list_runs(tmp_path), store)
    assert [row["differs in"] for row in rows] == ["limit 2", "limit 3"]
    assert "differs in" not in shown_runs(list_runs(tmp_path)[:1], store)[0]


def test_what_tells_most_runs_apart_is_named_first():
    def run(number, limit, *, other):
        first = record(1)
        common = {"tasks": ["t"], "num_fewshot": int(other), "limit": limit}
        benchmark = {**first.config["benchmark"], **common}
        config = {**first.config, "seed": int(other), "threads": 1, "benchmark": benchmark}
        return record(number).model_copy(
            update={"config": config, "methods": first.methods, "model": first.model}
        )

    runs = [run(1, 2, other=True), run(2, 3, other=False), run(3, 4, other=False)]
    said = differing_settings(runs)
    assert [said[run.id].split(",")[0] for run in runs] == ["limit 2", "limit 3", "limit 4"]


def test_a_run_of_one_task_is_listed_with_its_number(tmp_path):
    def scored(number, *metrics):
        run = record(number)
        kept = tuple(m for m in run.metrics if m.task in metrics)
        return run.model_copy(update={"metrics": kept})

    tasks = [m.task for m in record(1).metrics if m.headline and m.task != "average"]
    runs = [record(1), scored(2, tasks[0]), scored(3, *tasks[:2])]
    for run in runs:
        Store(tmp_path).write(run, [], "")
    scores = {row["run"]: row["score"] for row in list_runs(tmp_path)}
    mean, single = record(1).metric("average"), record(2).metric(tasks[0])
    assert scores[runs[0].id] == f"{100 * mean.value:.1f} %"
    assert scores[runs[1].id] == f"{100 * single.value:.1f} %"
    assert scores[runs[2].id] is None


def test_a_comparison_on_a_narrow_terminal_folds_no_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    numbers = {"low": -0.1234, "high": 0.0456, "gained": 12, "lost": 34, "p_holm": 0.0123}
    retained = {"retention": 96.3, "retention_low": 92.7, "retention_high": 99.7}
    contrast = Contrast(
        run=record(1).id, task="arc_challenge", metric="acc_norm", filter="none",
        higher_is_better=True, n=60, baseline=0.693, candidate=0.667, difference=-0.026,
        detectable=0.036, **numbers, **retained,
    )  # fmt: skip
    print_comparison(Comparison(record(0), (record(1),), (contrast,), ()))
    out = capsys.readouterr().out
    for cell in ("69.3", "-2.6 [-12.3, +4.6]", "+12 / -34", "0.012", "96.3 [92.7, 99.7]"):
        assert cell in out
    assert out.count("arc_challenge acc_norm %") > 1
