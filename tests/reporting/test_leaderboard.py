"""Each run is compared with the dense run of its own setting, and with nothing else."""

import pytest

from bench.reporting.leaderboard import build_leaderboard
from bench.reporting.record_numbers import distinct_labels
from bench.reporting.wandb_sync import build_overview
from tests.reporting.html.synthetic_records import metric, record


def row_of(runs, wanted):
    return next(row for row in runs.rows if row.record.id == wanted.id)


def test_each_run_is_compared_with_the_dense_run_of_its_model():
    dense, other = record(0), record(1, model="small")
    pruned = record(2, method="camera_p")
    runs = build_leaderboard([dense, other, pruned])
    assert {setting.name for setting in runs.settings} == {
        "tiny on nine (0-shot)",
        "small on nine (0-shot)",
    }
    row = row_of(runs, pruned)
    assert row.dense == dense.id
    kept = pruned.metric("average").value / dense.metric("average").value
    assert row.retention == pytest.approx(kept)
    assert row_of(runs, dense).retention == 1.0
    assert [row.record for row in runs.rows] == [pruned, other, dense]


def test_a_different_limit_is_a_different_setting_and_is_named():
    dense, pruned = record(0), record(1, method="camera_p")
    config = {**pruned.config, "benchmark": {**pruned.config["benchmark"], "limit": 60}}
    limited = pruned.model_copy(update={"config": config})
    runs = build_leaderboard([dense, limited])
    assert {setting.name for setting in runs.settings} == {
        "tiny on nine (0-shot)",
        "tiny on nine (0-shot, limit 60)",
    }
    assert row_of(runs, limited).dense is None
    assert row_of(runs, limited).retention is None


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"arc_easy": "acc"}}, {"overlong": "skip"}, {"allow_missing": 0.5},
        {"system_prompt": ""}, {"ocr_tokens": False},
    ],
)  # fmt: skip
def test_every_key_that_changes_numbers_makes_a_setting(change):
    plain, changed = record(0), record(1)
    usual = {"overlong": "truncate", "allow_missing": 0.0, "metrics": {}, "ocr_tokens": True}
    config = {**changed.config, "benchmark": {**changed.config["benchmark"], **usual}}
    spelt = changed.model_copy(update={"config": config})
    assert len(build_leaderboard([plain, spelt]).settings) == 1
    config = {**config, "benchmark": {**config["benchmark"], **change}}
    runs = build_leaderboard([plain, changed.model_copy(update={"config": config})])
    assert len({setting.name for setting in runs.settings}) == 2


def test_a_number_stands_in_the_column_of_its_own_metric_and_says_what_is_missing():
    one = record(0)
    rows = [metric("arc_easy", 0.75), metric("arc_easy", 0.5, "acc_norm", n=38)]
    rows[1] = rows[1].model_copy(update={"missing": 2})
    pair = [
        one.model_copy(update={"id": str(at) * 12, "metrics": (row,)})
        for at, row in enumerate(rows)
    ]
    runs = build_leaderboard(pair)
    (setting,) = runs.settings
    columns = [column.metric for column in setting.tasks]
    for run, row, note in zip(pair, rows, ("", " (n 38, 2 missing)"), strict=True):
        found, at = row_of(runs, run), columns.index(row.metric)
        assert (found.values[at], found.answered[at]) == ((row.value, row.stderr), note)
        assert found.values[1 - at] is None
    table = build_overview(runs, None).leaderboard
    cells = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows]
    by_run = {row["run"]: row for row in cells}
    assert by_run["0" * 12]["arc_easy acc,none"] == 0.75
    assert by_run["0" * 12]["arc_easy acc_norm,none"] is None
    assert by_run["1" * 12]["arc_easy acc_norm,none answered"] == "(n 38, 2 missing)"
    assert "arc_easy acc,none answered" not in table.columns


@pytest.mark.parametrize("change", [{"model": "f" * 8}, {"data": "e" * 64}])
def test_different_weights_or_data_are_a_different_setting(change):
    dense, pruned = record(0), record(1, method="camera_p")
    if "data" in change:
        update = {"provenance": {"data": {"boolq": {"fingerprint": change["data"]}}}}
    else:
        update = {"model": pruned.model.model_copy(update={"fingerprint": change["model"]})}
    runs = build_leaderboard([dense, pruned.model_copy(update=update)])
    assert len(runs.settings) == 2
    assert len({setting.name for setting in runs.settings}) == 2


def test_numbers_of_different_identity_are_not_compared():
    dense, pruned = record(0), record(1, method="camera_p")
    fewer = (metric("average", 0.5, "mean", n=3), *pruned.metrics[1:])
    runs = build_leaderboard([dense, pruned.model_copy(update={"metrics": fewer})])
    assert row_of(runs, pruned).retention is None
    versions = {"versions": {"lm-eval": "0.4.8"}}
    newer = build_leaderboard([dense, pruned.model_copy(update={"environment": versions})])
    assert row_of(newer, pruned).retention is None
    assert row_of(build_leaderboard([dense, pruned]), pruned).retention is not None


def test_a_score_of_zero_is_a_retention_of_zero():
    dense, pruned = record(0), record(1, method="camera_p")
    useless = (pruned.metrics[0].model_copy(update={"value": 0.0}), *pruned.metrics[1:])
    runs = build_leaderboard([dense, pruned.model_copy(update={"metrics": useless})])
    assert row_of(runs, pruned).retention == 0.0


def test_zeroed_weights_are_no_real_saving():
    runs = build_leaderboard([record(0), record(1, method="magnitude"), record(2, method="naee")])
    assert [(row.family, row.effect, row.real) for row in runs.rows] == [
        ("naee", "removed", True), ("magnitude", "zeroed", False), ("dense", "none", True),
    ]  # fmt: skip


def test_values_stand_in_the_order_of_the_settings_tasks():
    one = record(0)
    few = one.model_copy(update={"id": "b" * 12, "metrics": one.metrics[:2], "costs": ()})
    runs = build_leaderboard([one, few])
    tasks = runs.settings[0].tasks
    assert tasks[0].task == "average"
    assert not any(cost.scope.startswith("phase") for cost in runs.settings[0].costs)
    for run in (one, few):
        scores = {m.task: (m.value, m.stderr) for m in run.metrics}
        assert row_of(runs, run).values == tuple(scores.get(task.task) for task in tasks)
    assert set(row_of(runs, few).costs) == {None}


def test_runs_of_one_label_say_the_knobs_that_differ():
    plain = record(1, method="camera_p")

    def with_knob(number, **knobs):
        made = record(number, method="camera_p")
        method = made.methods[0].model_copy(
            update={"config": {"ratio": 0.4, "align": 8, "note": "x" * 90, **knobs}}
        )
        return made.model_copy(update={"methods": (method,)})

    two = [with_knob(2, bits=3, align=8), with_knob(3, bits=4, align=16)]
    labels = distinct_labels([record(0), *two])
    assert [labels[each.id] for each in two] == [
        "camera_p 0.4, align 8, bits 3",
        "camera_p 0.4, align 16, bits 4",
    ]
    assert labels[record(0).id] == "dense"
    repeated = plain.model_copy(update={"id": "f" * 12})
    assert set(distinct_labels([plain, repeated]).values()) == {"camera_p 0.4"}
