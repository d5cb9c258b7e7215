"""The counted cost is the headline in every report, whatever an analytic formula says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.models.source import is_fresh
from bench.records import AppliedMethod, Cost, EffectCheck, SizeAndWork
from bench.reporting.comparison.comparison import baseline_of
from bench.reporting.cost_table import print_costs
from bench.reporting.html.report import run_details
from bench.reporting.leaderboard import build_leaderboard
from bench.reporting.plots.breakdown import cost_parts
from bench.reporting.plots.points import run_points
from bench.reporting.record_numbers import benchmark_text, scored_text
from bench.reporting.summary import print_summary
from bench.reporting.tables.numbers import our_value
from bench.reporting.tables.table_config import TableColumn
from bench.reporting.wandb_sync import build_overview
from bench.schema import ModelConfig
from tests.reporting.html.synthetic_records import record

SCOPE = "forward 1x512"
COUNTED = Cost(
    scope=SCOPE, quantity="flops", unit="FLOP", value=1.33e9, how="counted",
    parts={"attention": 0.33e9, "other": 1e9},
)  # fmt: skip
ANALYTIC = Cost(
    scope=SCOPE, quantity="flops", unit="FLOP", value=1.69e9, how="analytic",
    parts={"attention": 0.69e9, "other": 1e9},
)  # fmt: skip


@pytest.fixture(params=["counted first", "analytic first"])
def both(request):
    """A run whose layers a foreign method dropped: the formula still counts the dense model."""
    costs = (COUNTED, ANALYTIC) if request.param == "counted first" else (ANALYTIC, COUNTED)
    return record(1, method="naee").model_copy(update={"costs": costs})


def evaluated(**benchmark):
    """A run with other settings of its benchmark than the usual."""
    run = record(1)
    return run.model_copy(
        update={"config": {**run.config, "benchmark": {**run.config["benchmark"], **benchmark}}}
    )


def with_sources(run, *sources):
    data = {
        m.task: {"origin": origin, "location": location}
        for m, (origin, location) in zip(run.metrics[1:], sources, strict=False)
    }
    return run.model_copy(update={"provenance": {"data": data}})


def test_a_heading_names_limit_shots_and_local_model():
    run = evaluated(limit=10)
    metrics = tuple(m.model_copy(update={"shots": 2}) for m in run.metrics)
    config = {**run.config, "model": {"name": "local", "path": "/models/qwen"}}
    run = run.model_copy(
        update={
            "metrics": metrics, "config": config,
            "model": run.model.model_copy(update={"name": "local"}),
        }
    )  # fmt: skip
    assert scored_text(run) == "local (qwen tinyffff) on nine (2-shot, limit 10)"


@pytest.mark.parametrize(
    ("sources", "heading"),
    [
        ([("hub", "ai2_arc")] * 2, "nine (0-shot)"),
        ([("embedded", "world:a"), ("embedded", "world:b")], "nine (embedded data, 0-shot)"),
        ([("hub", "x"), ("embedded", "world:b")], "nine (embedded: {1}, 0-shot)"),
        ([("file", "/d/my.jsonl"), ("hub", "x")], "nine ({0} from my.jsonl, 0-shot)"),
    ],
)
def test_a_heading_names_data_in_place_of_the_real(sources, heading):
    run = with_sources(record(1), *sources)
    assert benchmark_text(run) == heading.format(*(m.task for m in run.metrics[1:]))


@given(st.sampled_from([None, 1, 10, 60]), st.sampled_from([None, 1, 10, 60]))
def test_runs_share_a_heading_only_if_they_share_a_limit(one, other):
    headings = {benchmark_text(evaluated(limit=limit)) for limit in (one, other)}
    assert (len(headings) == 1) == (one == other)


def test_files_and_folders_of_one_name_have_headings_of_their_own():
    run = record(1)
    (task, *_) = run.config["benchmark"]["tasks"]
    headings = set()
    for folder, digest in (("a", "1" * 64), ("b", "2" * 64)):
        source = {"origin": "file", "location": f"/{folder}/q.jsonl", "fingerprint": digest}
        update = {
            "provenance": {"data": {task: source}},
            "config": {**run.config, "model": {"name": "local", "path": f"/{folder}/qwen"}},
            "model": run.model.model_copy(update={"fingerprint": digest}),
        }
        headings.add(scored_text(run.model_copy(update=update)))
    assert headings == {
        f"tiny (qwen {digit * 8}) on nine ({task} from q.jsonl {digit * 8}, 0-shot)"
        for digit in "12"
    }


def test_a_heading_names_what_decides_which_rows_have_a_number():
    assert benchmark_text(evaluated(overlong="truncate", allow_missing=0.0)) == "nine (0-shot)"
    run = evaluated(overlong="skip", allow_missing=0.1)
    run = run.model_copy(update={"config": {**run.config, "model": {"max_length": 64}}})
    assert benchmark_text(run) == "nine (0-shot, max_length 64, overlong skip, allow_missing 0.1)"


def test_an_unconfirmed_and_an_untrained_run_are_marked_everywhere(both, capsys):
    fresh = both.model.model_copy(update={"source": "fresh:lenet5"})
    counts = SizeAndWork(parameters=1, packed=0, bytes=4, flops=2.0)
    check = EffectCheck(found="none", before=counts, after=counts, refutation="reports nonsense")
    (method,) = both.methods
    fake = method.model_copy(update={"check": check, "trained": False})
    run = both.model_copy(update={"model": fresh, "methods": (fake,)})
    assert run.marks == ("untrained", "unconfirmed")
    assert run.label.startswith("untrained + naee")
    print_summary([run])
    out = capsys.readouterr().out
    assert "unconfirmed" in out
    assert "untrained" in out
    (row,) = build_leaderboard([run]).rows
    assert (row.effect, row.real, row.family) == ("unconfirmed", False, "untrained + naee")
    points = run_points([run], cost="flops")
    assert points["unreal"].tolist() == [True]
    assert run_details(run)["methods"][0]["check"]["refutation"] == "reports nonsense"
    (plot,) = build_overview(build_leaderboard([run]), None).pareto.values()
    assert plot.data.rows[0][1:4] == [run.label, "unconfirmed", False]


def test_the_reference_of_a_network_that_is_trained_here_is_the_one_that_only_trains():
    def run(number, *methods):
        fresh = record(number).model.model_copy(update={"source": "fresh:lenet5"})
        parts = tuple(
            AppliedMethod(name=name, config={}, effect=effect, report={}, seconds=1, trained=True)
            for name, effect in methods
        )
        return record(number).model_copy(update={"model": fresh, "methods": parts})

    untrained, trained, pruned = run(1), run(2, ("train", "none")), run(3, ("wgsef", "removed"))
    assert [r.family for r in (untrained, trained, pruned)] == ["untrained", "dense", "wgsef"]
    assert [r.label for r in (untrained, trained, pruned)] == ["untrained", "train", "wgsef"]
    assert baseline_of([untrained, trained, pruned]) is trained
    rows = build_leaderboard([untrained, trained, pruned]).rows
    assert {row.dense for row in rows} == {trained.id}


def test_one_cost_per_scope_and_quantity_stays(both):
    assert both.headline_costs == [COUNTED]
    assert both.cost("flops", SCOPE) == COUNTED
    only = both.model_copy(update={"costs": (ANALYTIC,)})
    assert only.headline_costs == [ANALYTIC]
    assert only.cost("seconds", SCOPE) is None


def test_the_leaderboard_and_the_overview_in_wandb_have_the_counted_value(both):
    runs = build_leaderboard([both])
    assert [row.costs for row in runs.rows] == [(1.33e9,)]
    overview = build_overview(runs, None)
    assert overview.leaderboard.rows[0][-1] == 1.33e9
    (plot,) = overview.pareto.values()
    assert plot.data.rows[0][4] == 1.33e9


def test_figures_and_tables_have_the_counted_value(both):
    assert run_points([both], cost="flops")["cost"].tolist() == [1.33e9]
    assert cost_parts([both], "flops")["value"].sum() == pytest.approx(1.33e9)
    column = TableColumn(quantity="flops", scope="forward", unit="FLOP")
    assert our_value(column, [both]).value == 1.33e9


def test_the_summary_has_the_counted_value(both, capsys):
    print_summary([both])
    out = capsys.readouterr().out
    assert "1.33 G" in out
    assert "1.69 G" not in out


def test_the_page_of_a_run_still_lists_both(both):
    assert {cost["how"] for cost in run_details(both)["costs"]} == {"counted", "analytic"}
    print_costs(both)


@pytest.mark.parametrize(
    ("source", "path", "drawn"),
    [
        ("fresh:lenet5", None, True),
        ("torchvision:resnet18", None, True),
        ("module", None, True),
        ("fresh:lenet5", "w.safetensors", False),
        ("torchvision:resnet18", "w.safetensors", False),
        ("embedded:micro_resnet", None, False),
        ("module/of_a_hub", None, False),
    ],
)
def test_weights_are_drawn_where_code_builds_the_network_and_no_path_has_them(source, path, drawn):
    one = record(1)
    model = one.model.model_copy(update={"source": source})
    config = {**one.config, "model": {"path": path}}
    run = one.model_copy(update={"model": model, "methods": (), "config": config})
    assert (run.drawn, run.untrained) == (drawn, drawn)
    assert run.label == ("untrained" if drawn else "dense")
    fresh = ModelConfig(
        name="n", source=source, path=path, kind="image_classifier",
        _target_="mine.Net" if source == "module" else None,
    )  # fmt: skip
    assert is_fresh(fresh) == drawn
