"""The table after a sweep: nothing is cut, however narrow the terminal, and dense comes first."""

import pytest

from bench.records.record import AppliedMethod, Cost, DenseModel, Metric, MissingMeasurement, Record
from bench.reporting.summary import print_summary

MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)


def recorded(number, *methods, effect="removed", costs=()):
    metric = Metric(
        benchmark="exam", task="average", metric="acc", filter="none", shots=0, split="test",
        value=number / 100, stderr=0.01, n=9, higher_is_better=True, headline=True,
    )  # fmt: skip
    parts = tuple(
        AppliedMethod(name=name, config={"ratio": 0.2}, effect=effect, report={}, seconds=1)
        for name in methods
    )
    return Record(
        id=f"{number:x}".ljust(12, "0"), started="", finished="", sweep=None, command="",
        config={"benchmark": {"name": "exam"}}, environment={}, model=MODEL, methods=parts,
        metrics=(metric,), costs=costs, provenance={},
    )  # fmt: skip


@pytest.mark.parametrize(("width", "tables"), [(54, 10), (80, 9), (120, 4), (300, 2)])
def test_no_cell_is_cut_and_the_dense_run_comes_first(width, tables, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    records = [recorded(50 + i, "random_experts", "camera_p") for i in range(9)]
    records.append(recorded(70))
    print_summary(records)
    out = capsys.readouterr().out
    assert "…" not in out
    for record in records:
        assert f"{100 * record.metric('average').value:.1f} ±1.0" in out
        assert record.id[:8] in out
    first_table = out.split("tiny on exam")[1]
    columns = {
        name: next((line.index(name) for line in first_table.splitlines() if name in line), width)
        for name in ("dense", "random_experts")
    }
    assert columns["dense"] < columns["random_experts"]
    assert out.count("tiny on exam") == tables


def test_every_record_is_shown_even_where_one_does_not_fit(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10")
    print_summary([recorded(60), recorded(70)])
    assert capsys.readouterr().out.count("tiny") == 2


def test_work_is_shown_and_a_masked_run_gains_no_time(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    scope = "prefill 1x(64 visual + 9 text)"

    def costs(flops, seconds):
        return (
            Cost(scope=scope, quantity="flops", unit="FLOP", value=flops, how="counted"),
            Cost(scope=scope, quantity="seconds", unit="s", value=seconds, how="measured"),
        )

    real = recorded(50, "skip", costs=costs(1e9, 0.25))
    masked = recorded(51, "mask", effect="masked", costs=costs(2e9, 0.125))
    print_summary([real, masked])
    out = capsys.readouterr().out
    assert "1.00 G" in out and "2.00 G" in out
    assert "0.2500" in out and "0.1250" not in out
    (line,) = [line for line in out.splitlines() if line.startswith(f" {scope} s")]
    assert "masked" in line


def test_rows_without_an_answer_stand_beside_the_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    whole = recorded(60)
    metric = whole.metrics[0].model_copy(update={"task": "piqa", "n": 38, "missing": 2})
    gone = metric.model_copy(update={"value": None, "stderr": None, "n": 0, "missing": 40})
    reason = "40 of 40 rows have no answer: a log-likelihood is not finite (rows 0, 1 [/x])"
    gap = MissingMeasurement(scope="piqa", quantity="acc", reason=reason)
    print_summary(
        [
            whole.model_copy(update={"metrics": (metric,)}),
            whole.model_copy(update={"metrics": (gone,), "missing": (gap,), "id": "f" * 12}),
        ]
    )
    out = capsys.readouterr().out
    assert "60.0 ±1.0 (n 38, 2 missing)" in out and "- (n 0, 40 missing)" in out
    assert f"no acc for piqa: {reason}" in out


def test_each_metric_of_a_task_has_a_row_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    runs = []
    for number, name in ((75, "acc"), (50, "acc_norm")):
        run = recorded(number)
        (average,) = run.metrics
        average = average.model_copy(update={"metric": "mean", "value": 0.6, "n": 2})
        arc = average.model_copy(update={"task": "arc_easy", "metric": name, "n": 8})
        arc = arc.model_copy(update={"value": number / 100})
        piqa = arc.model_copy(update={"task": "piqa", "metric": "acc", "value": 0.4})
        config = {"benchmark": {"name": "exam", "metrics": {"arc_easy": name}}}
        runs.append(run.model_copy(update={"metrics": (arc, average, piqa), "config": config}))
    print_summary(runs)
    out = capsys.readouterr().out
    cells = {
        line.split("  ")[0].strip(): line.split("  ")[1:]
        for line in out.splitlines() if "n=" in line
    }  # fmt: skip
    shown = {title: " ".join(rest).split() for title, rest in cells.items()}
    assert shown == {
        "average mean %, n=2, with arc_easy acc,none": ["60.0", "±1.0", "-"],
        "average mean %, n=2, with arc_easy acc_norm,none": ["-", "60.0", "±1.0"],
        "arc_easy acc %, n=8": ["75.0", "±1.0", "-"],
        "arc_easy acc_norm %, n=8": ["-", "50.0", "±1.0"],
        "piqa acc %, n=8": ["40.0", "±1.0", "40.0", "±1.0"],
    }


@pytest.mark.parametrize("section", ["model", "data"])
def test_numbers_over_other_data_or_settings_have_a_table_of_their_own(section, capsys):
    runs = []
    for digit in "12":
        run = recorded(int(digit))
        source = {"origin": "hub", "location": "q", "fingerprint": digit * 64}
        changes = {
            "model": {"config": {**run.config, "model": {"dtype": f"float{digit}"}}},
            "data": {"provenance": {"data": {"average": source}}},
        }
        runs.append(run.model_copy(update=changes[section]))
    print_summary(runs)
    assert capsys.readouterr().out.count("tiny on exam") == 2


def test_an_average_counts_tasks_and_missing_rows_under_their_names(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run = recorded(60)
    average = run.metrics[0].model_copy(update={"n": 2, "missing": 6})
    print_summary([run.model_copy(update={"metrics": (average,)})])
    assert "60.0 ±1.0 (2 tasks, 6 rows missing)" in capsys.readouterr().out


def test_runs_of_one_label_are_told_apart_by_the_knobs_that_differ(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")

    def quantized(number, bits):
        run = recorded(number, "rtn")
        (part,) = run.methods
        return run.model_copy(
            update={"methods": (part.model_copy(update={"config": {"bits": bits}}),)}
        )

    print_summary([quantized(60, 2), quantized(70, 4)])
    out = capsys.readouterr().out
    assert "bits 2" in out
    assert "bits 4" in out
