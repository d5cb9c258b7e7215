"""Figures of records: what they show is checked as data, what they are as files."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from bench.cli.main import main
from bench.errors import UserError
from bench.records import AppliedMethod, Cost, DenseModel, Metric, Record, Store
from bench.reporting.comparison import ComparedRun
from bench.reporting.plots import breakdown, calibration_curves, curves, pareto
from bench.reporting.plots.allocation import allocation_grids
from bench.reporting.plots.points import family_names, knob_value, run_points, series_names
from bench.reporting.plots.style import GREY, series_styles
from bench.reporting.statistics import CONFIDENCE

MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)


def cost(quantity, value, scope="forward", unit="FLOP", **parts):
    return Cost(scope=scope, quantity=quantity, unit=unit, value=value, how="counted", parts=parts)


def made(
    identifier,
    value,
    flops,
    method=None,
    effect="removed",
    report=None,
    layers=(),
    costs=(),
    **knobs,
):
    metric = Metric(
        benchmark="exam", task="average", metric="mean", filter="none", shots=0, split="test",
        value=value, stderr=0.01, n=2, higher_is_better=True, headline=True,
    )  # fmt: skip
    methods = ()
    if method is not None:
        part = AppliedMethod(
            name=method, config=knobs, effect=effect, report=report or {}, layers=layers, seconds=1
        )
        methods = (part,)
    return Record(
        id=identifier.ljust(12, "0"), started=identifier, finished="", sweep=None, command="",
        config={"benchmark": {"name": "exam"}, "calibration": {"rows": 8}, "ratio": 0.2},
        environment={}, model=MODEL, methods=methods, metrics=(metric,),
        costs=(cost("flops", flops, attention=flops / 4, experts=3 * flops / 4), *costs),
        provenance={},
    )  # fmt: skip


LAYERS = [
    {
        "layer": number, "experts": ["shared", 0, 1], "width_per_expert": [4, 8, 8],
        "removed_per_expert": [0, 8, 2 * number], "energy_per_expert": [1.0, 2.0, 1.0],
    }
    for number in range(2)
]  # fmt: skip
HISTORY = [{"epoch": 1, "loss": 2.0, "accuracy": 0.5}, {"epoch": 2, "loss": 1.0, "accuracy": 0.7}]


@pytest.fixture
def records():
    return [
        made("a", 0.7, 8e9),
        made("b", 0.65, 6e9, "prune", ratio=0.2, layers=LAYERS),
        made("c", 0.6, 4e9, "prune", ratio=0.4, report={"history": HISTORY}),
        made("d", 0.5, 8e9, "mask", effect="masked", ratio=0.2),
    ]


def test_points_are_in_percent_with_half_an_interval(records):
    frame = run_points(records, cost="flops")
    assert frame["value"].tolist() == pytest.approx([70, 65, 60, 50])
    assert frame["error"].tolist() == pytest.approx([1.959964] * 4)
    assert frame["cost"].tolist() == [8e9, 6e9, 4e9, 8e9]
    assert frame["unreal"].tolist() == [False, False, False, True]
    assert CONFIDENCE == 0.95


def test_a_masked_run_has_no_time(records):
    timed = [
        record.model_copy(update={"costs": (cost("seconds", 1.0, unit="s", least=0.5, most=3.0),)})
        for record in records
    ]
    frame = run_points(timed, cost="seconds")
    assert frame["run"].str[0].tolist() == ["a", "b", "c"]
    assert frame["cost_low"].tolist() == [0.5] * 3
    assert frame["cost_high"].tolist() == [3.0] * 3


def test_runs_that_differ_in_more_than_an_amount_are_two_families():
    runs = [
        made("a", 0.7, 1.0),
        made("b", 0.7, 1.0, "prune", ratio=0.2, refit=False),
        made("c", 0.7, 1.0, "prune", ratio=0.4, refit=True),
        made("d", 0.7, 1.0, "other", ratio=0.4, refit=True),
    ]
    assert list(family_names(runs).values()) == [
        "dense", "prune, refit=False", "prune, refit=True", "other",
    ]  # fmt: skip
    assert len(set(family_names(runs, along="prune.refit").values())) == 3


def test_a_knob_is_a_methods_own_or_a_path_and_never_a_default_of_the_run(records):
    assert [knob_value(record, "ratio") for record in records] == [None, 0.2, 0.4, 0.2]
    assert knob_value(records[1], "calibration.rows") == 8
    assert knob_value(records[1], "prune.ratio") == 0.2
    assert knob_value(made("e", 0.5, 1.0, "quantize"), "ratio") is None


def test_seeds_become_one_point_with_their_range(records):
    seeds = [made(f"e{i}", value, 4e9, "prune", ratio=0.4) for i, value in enumerate((0.5, 0.7))]
    frame = curves.summarize_families(run_points([*records, *seeds]))
    (row,) = frame[(frame["family"] == "prune") & (frame["amount"] == 0.4)].to_dict("records")
    assert (row["value"], row["low"], row["high"], row["runs"]) == pytest.approx((60, 50, 70, 3))


def test_experts_become_a_map_of_what_is_kept_and_one_of_energy(records):
    kept, energy = allocation_grids(records)
    assert kept.columns == ("shared", "0", "1")
    assert kept.values.tolist() == [[1, 0, 1], [1, 0, 0.75]]
    assert energy.values.tolist() == [[0.25, 0.5, 0.25]] * 2


def test_heads_groups_and_bits_become_maps():
    work = [{"heads": 2, "neurons": 4}, {"heads": 1, "neurons": 0}]
    heads = {"heads": [[0, 1], [1]], "shape": {"heads": 2, "widths": [4, 4]}, "work": work}
    groups = {"kept_by_layer": {"x": 1, "y": 3}, "groups_by_layer": {"x": 4, "y": 3}}
    bits = [{"layer": 0, "mean_bits": 2.25}, {"layer": 1, "mean_bits": 2.5}]
    found = {
        grid.quantity: grid.values.tolist()
        for report, layers in ((heads, ()), (groups, ()), ({}, bits))
        for grid in allocation_grids([made("a", 0.5, 1.0, "m", report=report, layers=layers)])
    }
    assert found == {
        "heads kept for visual tokens": [[1, 1], [0, 1]],
        "heads for visual tokens": [[1, 0.5]],
        "neurons for visual tokens": [[1, 0]],
        "groups alive": [[0.25, 1]],
        "bits per weight": [[2.25, 2.5]],
    }


def test_the_parts_of_a_cost_add_up_and_a_spread_is_none(records):
    frame = breakdown.cost_parts(records, "flops")
    assert frame.groupby("run")["value"].sum().tolist() == pytest.approx([8e9, 6e9, 4e9, 8e9])
    spread = made("e", 0.5, 1.0, costs=(cost("seconds", 1.0, unit="s", least=0.5, most=3.0),))
    with pytest.raises(UserError, match="--cost seconds: no run records parts of it; choose one"):
        breakdown.cost_parts([spread], "seconds")


def test_time_within_a_method_is_not_counted_twice():
    walls = {
        "applying prune": 5.0, "watching experts": 3.0, "tiny on a": 1.0, "tiny on b": 2.0,
        "loading the model": 0.5,
    }  # fmt: skip
    costs = [cost("wall", v, scope=f"phase {name}", unit="s") for name, v in walls.items()]
    frame = breakdown.cost_parts([made("a", 0.5, 1.0, "prune", costs=costs)], "wall")
    assert dict(zip(frame["part"], frame["value"], strict=True)) == {
        "methods, the rest": 2.0, "watching experts": 3.0, "scoring": 3.0, "loading the model": 0.5,
    }  # fmt: skip


def test_training_keeps_every_number_of_every_epoch(records):
    frame = curves.training_histories(records)
    assert frame[["quantity", "at", "value"]].values.tolist() == [
        ["loss", 1, 2.0], ["accuracy", 1, 0.5], ["loss", 2, 1.0], ["accuracy", 2, 0.7],
    ]  # fmt: skip
    with pytest.raises(UserError, match="no history"):
        curves.training_histories(records[:2])


def test_seeds_of_one_setting_are_one_line_and_their_budget_is_drawn():
    def run(name, strength, alive):
        history = [
            {"epoch": 1, "alive": alive, "fractional": 3, "k": 9},
            {"epoch": 2, "alive": 5, "fractional": 0, "k": 5},
        ]
        report = {"history": history}
        return made(name, 0.5, 1.0, "envelope", report=report, strength=strength)

    frame = curves.training_histories([run("a", "auto", 7), run("b", "auto", 8), run("c", 0.3, 9)])
    assert frame.groupby("series", sort=False)["run"].nunique().tolist() == [2, 1]
    assert set(frame.loc[frame["quantity"] == "alive", "budget"]) == {5}
    alive, between = curves.draw_training(frame).axes
    # A band where there are several seeds.
    assert len(alive.collections) == len(between.collections) == 1
    assert [line.get_ydata()[0] for line in alive.lines] == [7.5, 9, 5]


def test_confidence_is_the_softmax_of_the_choices_and_the_error_its_gap():
    samples = pd.DataFrame(
        {
            "acc": [1.0, 0.0, None],
            "loglikelihoods": [[0.0, np.log(4)], [0.0, np.log(9), -np.inf], [-1.0]],
        }
    )
    found = calibration_curves.answer_confidences(samples)
    assert found["confidence"].tolist() == pytest.approx([0.8, 0.9])
    bins = calibration_curves.bin_answers(found)
    assert calibration_curves.expected_calibration_error(bins) == pytest.approx(
        (abs(1 - 0.8) + abs(0 - 0.9)) / 2
    )
    classified = samples.assign(probability=[0.7, None, None], loglikelihoods=[[], [], []])
    assert calibration_curves.answer_confidences(classified)["confidence"].tolist() == [0.7]


def test_families_differ_in_more_than_colour():
    found = series_styles(["dense", *(f"family {i}" for i in range(60))])
    assert len(set(found.values())) == 61
    assert len({(look.colour, look.marker) for look in found.values()}) == 61
    same_colour = [look for look in found.values() if look.colour == found["family 0"].colour]
    assert len({look.marker for look in same_colour}) == len(same_colour)


@pytest.fixture
def results(tmp_path, records):
    rows = [
        {"task": "t", "doc_id": i, "acc": float(i % 3 > 0), "loglikelihoods": [0.0, float(i)]}
        for i in range(30)
    ]
    for record in records:
        Store(tmp_path).write(record, rows, "")
    return tmp_path


KINDS = ("front", "curves", "allocation", "breakdown", "calibration", "training")


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_in_every_format_and_as_json(kind, results, capsys):
    assert main(["plot", kind, "--results-dir", str(results)]) == 0
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        file = results / "plots" / f"{kind}.{suffix}"
        assert file.read_bytes().startswith(start)
        assert file.stat().st_size > 2000
    capsys.readouterr()
    assert main(["plot", kind, "--json", "--results-dir", str(results)]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_names_are_shown_as_they_are(kind, tmp_path):
    name = "_cost $_^$"
    for identifier, report in (("a", {}), ("b", {"history": HISTORY})):
        run = made(identifier, 0.6, 6e9, name, ratio=0.2, layers=LAYERS, report=report)
        rows = [
            {"task": "t", "doc_id": i, "acc": float(i % 3 > 0), "loglikelihoods": [0.0, float(i)]}
            for i in range(9)
        ]
        Store(tmp_path).write(run, rows, "")
    figure = tmp_path / "figure.svg"
    assert main(["plot", kind, "--results-dir", str(tmp_path), "--output", str(figure)]) == 0
    assert name in figure.read_text() or kind == "breakdown"


def test_the_legend_names_series_that_are_not_in_the_first_panel():
    right = [{"epoch": 1, "accuracy": 0.5}]
    runs = [
        made("a", 0.5, 1.0, "first", report={"history": HISTORY}),
        made("b", 0.5, 1.0, "second", report={"history": right}),
    ]
    figure = curves.draw_training(curves.training_histories(runs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


def test_the_same_runs_give_the_same_file(results):
    both = [results / "one.svg", results / "two.svg"]
    for file in both:
        main(["plot", "front", "--results-dir", str(results), "--output", str(file)])
    assert both[0].read_bytes() == both[1].read_bytes()
    assert "prune" in both[0].read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frnt"], "did you mean 'front'"),
        (["front", "--cost", "flop"], "did you mean 'flops'"),
        (["front", "--task", "averge"], "did you mean 'average'"),
        (["front", "--output", "x.gif"], "png, svg, pdf"),
        (["curves", "--knob", "rati"], "no run has a numeric value of it; numeric knobs"),
        (["allocation", "a"], "none of the runs has a method that reports"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, said, results, capsys):
    assert main(["plot", *arguments, "--results-dir", str(results)]) == 2
    assert said in capsys.readouterr().err


def test_a_number_of_heads_instead_of_lists_is_no_map():
    """A budget search reports how many heads are kept in all, beside the shape."""
    report = {"heads": 12, "shape": {"heads": 2, "widths": [4]}}
    assert allocation_grids([made("a", 0.5, 1.0, "yopo", report=report)]) == []


@pytest.mark.parametrize(
    "report",
    [
        {"shape": [3, 4], "heads": [[0]]},
        {"shape": {"heads": 2}, "heads": [[0, 2]]},
        {"shape": {"heads": 2}, "heads": [["left"]]},
        {"shape": {"heads": 2}, "head_pruning": 0.5},
        {"shape": {"heads": 2}, "work": 3.5},
        {"shape": {"heads": 2, "widths": [4]}, "work": [{"heads": 1, "neurons": 1}] * 2},
        {"shape": {"heads": 0, "widths": [4]}, "work": [{"heads": 1, "neurons": 1}]},
        {"groups_by_layer": {"x": 4}, "kept_by_layer": {}},
        {"groups_by_layer": {"x": 0}, "kept_by_layer": {"x": 0}},
        {"groups_by_layer": 4, "kept_by_layer": 2},
    ],
)
def test_reports_that_use_the_keys_for_something_else_are_no_map(report):
    assert allocation_grids([made("a", 0.5, 1.0, "own", report=report)]) == []


def test_losses_of_another_form_are_no_history():
    with pytest.raises(UserError, match="no history to draw"):
        curves.training_histories([made("a", 0.5, 1.0, "own", report={"losses": 3})])


def test_only_layers_with_a_number_per_expert_are_a_map():
    whole, other = LAYERS[0], {**LAYERS[1], "removed_per_expert": [1]}
    absent = {key: value for key, value in whole.items() if key != "removed_per_expert"}
    layers = [whole, other, {**absent, "layer": 2}]
    kept, _ = allocation_grids([made("a", 0.5, 1.0, "own", layers=layers)])
    assert kept.rows == ("0",)


def test_runs_of_generation_tasks_alone_have_no_confidence(records):
    generated = pd.DataFrame({"exact_match": [1.0], "loglikelihoods": [[]], "response": ["7"]})
    assert calibration_curves.answer_confidences(generated).empty
    with pytest.raises(UserError, match="no answer has a probability"):
        calibration_curves.confidence_curves([ComparedRun(records[0], generated)])


def test_answers_without_a_probability_are_left_out():
    none = -float("inf")
    scores = [[0.0, 0.0], [float("nan"), 0.0], [none, none], [0.0, none]]
    table = pd.DataFrame({"acc": [1.0, 1.0, 1.0, 0.0], "loglikelihoods": scores})
    assert calibration_curves.answer_confidences(table)["confidence"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("knob", "stars"), [("ratio", 1), ("prune.ratio", 1), ("bits", 0)])
def test_the_dense_star_stands_at_zero_only_where_zero_is_dense(knob, stars):
    runs = [made("a", 0.7, 1.0), made("b", 0.6, 1.0, "prune", ratio=0.2, bits=4)]
    frame = curves.summarize_families(run_points(runs, knob=knob))
    (axes,) = curves.draw_curves(frame, knob).axes
    assert [line.get_marker() for line in axes.lines].count("*") == stars


def test_a_masked_run_is_never_on_the_front(records):
    """Its counted cost is not real: it must not make a real run look dominated."""
    masked = made("e", 0.9, 1e9, "mask", effect="masked", ratio=0.9)
    (axes,) = pareto.draw_fronts(run_points([*records, masked], cost="flops")).axes
    front = next(line for line in axes.lines if line.get_color() == GREY)
    assert list(front.get_xdata()) == [4e9, 6e9, 8e9]
    assert front.get_drawstyle() == "steps-post"


@pytest.mark.parametrize("better", [True, False])
def test_a_ratio_stands_on_the_side_without_a_line(records, better):
    frame = run_points(records, cost="flops").assign(higher_is_better=better)
    (axes,) = pareto.draw_fronts(frame).axes
    places = [text.xyann for text in axes.texts]
    assert len(places) == 2
    # A step goes to the right of its run, and comes from the worse side.
    assert all(x < 0 and (y > 0) == better for x, y in places)
    assert ("higher" if better else "lower") + " is better" in axes.get_ylabel()


def test_a_panel_without_the_knob_is_not_drawn():
    other = MODEL.model_copy(update={"name": "elsewhere"})
    runs = [
        made("a", 0.7, 1.0), made("b", 0.6, 1.0, "prune", ratio=0.2),
        made("c", 0.5, 1.0).model_copy(update={"model": other}),
    ]  # fmt: skip
    frame = curves.summarize_families(run_points(runs))
    (axes,) = curves.draw_curves(frame, "ratio").axes
    assert axes.get_title(loc="left").startswith(MODEL.name)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (3, 10), (199, 400)])
def test_intervals_of_bins_are_wilsons(right, n):
    share, size = pd.Series([right / n]), pd.Series([n])
    low, high = calibration_curves.wilson_interval(share, size)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_runs_without_a_value_are_one_sentence(records):
    empty = [
        record.model_copy(
            update={"metrics": (record.metrics[0].model_copy(update={"value": None}),)}
        )
        for record in records
    ]
    with pytest.raises(UserError, match="--task average: all runs have an empty value"):
        run_points(empty)


def test_runs_that_share_a_heading_and_not_what_was_scored_share_no_panel():
    def on(run, **changed):
        benchmark = {"name": "exam", "tasks": ["a", "b"], **changed}
        return run.model_copy(update={"config": {**run.config, "benchmark": benchmark}})

    runs = [
        on(made("1", 0.7, 100)), on(made("2", 0.6, 90, "prune", ratio=0.1)),
        on(made("3", 0.9, 80, "prune", ratio=0.2), tasks=["a"]),
        on(made("4", 0.8, 70, "prune", ratio=0.3), limit=10),
    ]  # fmt: skip
    names = dict(run_points(runs)[["run", "benchmark"]].values)
    assert names["1".ljust(12, "0")] == names["2".ljust(12, "0")]
    assert len(set(names.values())) == 3
    assert 'tasks ["a"]' in names["3".ljust(12, "0")]
    assert "limit 10" in names["4".ljust(12, "0")]


def test_seeds_of_a_network_drawn_at_random_share_a_line():
    def drawn(identifier, seed):
        run = made(identifier, 0.7, 90, "prune", ratio=0.1)
        model = run.model.model_copy(update={"source": "fresh:net", "fingerprint": identifier})
        config = {**run.config, "model": {"seed": seed}}
        return run.model_copy(update={"model": model, "config": config})

    found = run_points([drawn("1", 1), drawn("2", 2)])
    assert found["benchmark"].nunique() == 1
    assert curves.summarize_families(found)["runs"].tolist() == [2]


def composed(identifier, value, *methods, calibration=None):
    """A run of several methods, given as (name, knobs), on calibration text if there is one."""
    run = made(identifier, value, 1.0)
    parts = tuple(
        AppliedMethod(name=name, config=knobs, effect="removed", report={}, seconds=1)
        for name, knobs in methods
    )
    text = {"name": "c4", "source": "c4", "seed": 1, **(calibration or {})}
    provenance = {} if calibration is None else {"calibration": "hash"}
    config = {**run.config, "calibration": text}
    more = {"methods": parts, "config": config, "provenance": provenance}
    return run.model_copy(update=more)


@pytest.mark.parametrize(
    ("knob", "runs", "points"),
    [
        # Along alpha, two ratios are two lines, and no mean of both.
        ("prune.alpha", [[("prune", {"ratio": r, "alpha": 0.5})] for r in (0.2, 0.4)], 2),
        ("ratio", [[("prune", {"ratio": 0.2, "k": k})] for k in (8, 16)], 2),
        # The ratio of the run, which both take, moves them together along one line ...
        ("ratio", [[("prune", {"ratio": r}), ("zero", {"ratio": r})] for r in (0.2, 0.4)], 2),
        # ... and a ratio of the second alone does not hide behind that of the first.
        ("ratio", [[("prune", {"ratio": 0.2}), ("zero", {"ratio": r})] for r in (0.2, 0.4)], 2),
    ],
)
def test_a_point_of_a_curve_is_a_mean_over_seeds_only(knob, runs, points):
    made_runs = [composed(str(number), 0.5, *methods) for number, methods in enumerate(runs)]
    made_runs.append(composed("9", 0.7, *runs[0]))
    frame = curves.summarize_families(run_points(made_runs, knob=knob, amounts=()))
    assert sorted(frame["runs"]) == [1] * (points - 1) + [2]


def test_one_line_where_several_methods_take_the_ratio_of_the_run():
    runs = [
        composed(str(ratio), 0.5, ("prune", {"ratio": ratio}), ("zero", {"ratio": ratio}))
        for ratio in (0.2, 0.4)
    ]
    assert set(family_names(runs, amounts=()).values()) == {"prune + zero"}


def test_the_text_that_methods_read_separates_families_and_its_seed_does_not():
    method = ("prune", {"ratio": 0.2})
    texts = [{"rows": 8}, {"rows": 8, "seed": 2}, {"rows": 64}, {"rows": 8, "name": "english"}]
    runs = [composed(str(n), 0.5, method, calibration=text) for n, text in enumerate(texts)]
    families = list(family_names(runs).values())
    assert families[0] == families[1] == ("prune, calibration.name=c4, calibration.rows=8")
    assert len(set(families)) == 3
    assert len(set(series_names(runs).values())) == 3
    # A text that no method reads is nobody's.
    unread = [composed(str(n), 0.5, method) for n in range(2)]
    assert set(family_names(unread).values()) == {"prune"}


def test_costs_of_different_shapes_do_not_share_an_axis():
    def counted(identifier, scope):
        parts = {"attention": 1e9, "experts": 3e9}
        run = made(identifier, 0.5, 1.0, "prune", ratio=0.2)
        return run.model_copy(update={"costs": (cost("flops", 4e9, scope, **parts),)})

    runs = [counted("1", "forward 1x32"), counted("2", "forward 1x512")]
    for read in (run_points, breakdown.cost_parts):
        with pytest.raises(UserError, match='as in --scope "forward 1x32"'):
            read(runs, cost="flops")
        assert set(read(runs, cost="flops", scope="forward 1x32")["run"].str[0]) == {"1"}


def test_a_cost_in_another_scope_or_of_masked_runs_is_not_called_unknown(records):
    with pytest.raises(UserError, match='--scope "nowhere": no run has flops of it; give one of'):
        run_points(records, cost="flops", scope="nowhere")
    timed = (cost("seconds", 1.0, unit="s"),)
    masked = [record.model_copy(update={"costs": timed}) for record in records[-1:]]
    with pytest.raises(UserError, match="only zero or mask weights"):
        run_points(masked, cost="seconds")
    with pytest.raises(UserError, match="unknown cost 'flop': did you mean 'flops'"):
        run_points(records, cost="flop")
