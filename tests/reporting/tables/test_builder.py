"""Tables from records: which records count, what is subtracted, and what is refused and why."""

from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.tables import (
    build_table,
    builder,
    load_table_config,
    matching,
    table_of,
    table_slots,
    tables_of,
    writers,
)
from bench.reporting.tables import numbers as numbers_of
from bench.reporting.tables.published import PublishedCell
from bench.reporting.tables.table import OurValue
from tests.reporting.tables.table_records import (
    DEEPSEEK,
    camera,
    lines_of,
    mean_of_nine,
    metric,
    recorded,
)


def test_ours_less_theirs_and_whether_theirs_is_in_our_interval():
    table = camera(
        pruned=recorded(1, mean_of_nine(0.5900, stderr=0.004)),
        naee=recorded(2, mean_of_nine(0.6000, stderr=0.004)),
    )
    cell = lines_of(table)[DEEPSEEK, "Camera-P", "40%"].cells[0]
    assert cell.published.value == Decimal("58.58")
    assert cell.difference == pytest.approx(0.42)
    assert cell.inside
    assert cell.ours.low == pytest.approx(59 - 1.95996 * 0.4, abs=1e-4)
    other = lines_of(table)[DEEPSEEK, "NAEE", "40%"].cells[0]
    assert other.difference == pytest.approx(60 - 54.94)
    assert other.inside is False
    assert table.refusals == ()
    assert lines_of(table)[DEEPSEEK, "D2-MoE", "40%"].cells[0].ours is None


def test_a_row_that_differs_is_not_subtracted():
    config = load_table_config("camera_main", chosen={"sections": [DEEPSEEK]})
    slot = next(s for s in table_slots(config) if (s.row, s.variant) == ("NAEE", "40%"))
    table = build_table(config, {slot: [recorded(1, mean_of_nine(0.59))]})
    cell = lines_of(table)[DEEPSEEK, "NAEE", "40%"].cells[0]
    assert cell.ours is not None and cell.published is not None
    assert cell.difference is None
    assert "searches greedily" in cell.refusal


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (recorded(1, mean_of_nine(0.59), limit=6), "ours covers only the first 6 samples"),
        (recorded(1, mean_of_nine(0.59, n=2)), "ours is the mean of 2 tasks, not of 9"),
        (recorded(1, mean_of_nine(0.59, shots=5)), "shots: ours 5, the table's 0"),
        (recorded(1, mean_of_nine(0.59), harness="other"), "harness: ours other, the table's"),
    ],
)
def test_numbers_of_different_identity_are_not_subtracted(record, reason):
    cell = lines_of(camera(pruned=record))[DEEPSEEK, "Camera-P", "40%"].cells[0]
    assert cell.ours is not None
    assert cell.published is not None
    assert cell.difference is None
    assert cell.inside is None
    assert reason in cell.refusal


def test_a_metric_of_another_name_is_not_ours():
    table = camera(pruned=recorded(1, metric("average", 0.59, name="acc", split="mixed")))
    assert lines_of(table)[DEEPSEEK, "Camera-P", "40%"].cells[0].ours is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metric", "acc_norm"), ("filter", "strict"), ("shots", 5), ("split", "dev"),
        ("harness", "helm"),
    ],
)  # fmt: skip
def test_every_part_of_their_identity_counts_and_what_is_not_stated_is_assumed(field, value):
    column = load_table_config("camera_main").columns["avg"]
    theirs = {
        "paper": "p", "table": "t", "model": "m", "row": "r", "setting": "", "column": "avg",
        "metric": "", "filter": "", "shots": None, "split": "", "harness": "", "unit": "%",
        "relation": "=", "value": "50.0", "source": "s", "trust": "paper", "flag": "",
    }  # fmt: skip
    silent = PublishedCell(**theirs)
    ours = [recorded(1, mean_of_nine(0.5))]
    assert numbers_of.incomparable_reason(column, ours, silent) is None
    assert len(numbers_of.unstated_parts(column, silent)) == 5
    said = numbers_of.incomparable_reason(column, ours, silent.model_copy(update={field: value}))
    assert said.startswith(f"{field}: ours ")
    assert said.endswith(f"theirs {value}")
    odd = silent.model_copy(update={"unit": "points"})
    assert numbers_of.incomparable_reason(column, ours, odd) == "unit: ours %, theirs points"


def test_fine_tuned_rows_other_splits_and_other_flops_are_refused():
    config = load_table_config("visual_table2", chosen={"sections": ["LLaVA-1.5-7B"]})
    gqa = metric("gqa", 0.61, name="exact_match", split="testdev")
    vqa = metric("vqav2_val", 0.77, name="exact_match", split="validation")
    record = recorded(1, gqa, vqa, harness="lmms_eval")
    record.config["model"] = {"processor": {"resize": "pad"}}
    found = {slot: [record] for slot in table_slots(config) if slot.row in ("original", "YOPO 25%")}
    table = build_table(config, found)
    place = {head.name: i for i, head in enumerate(table.columns)}
    dense = lines_of(table)["LLaVA-1.5-7B", "original", ""]
    assert dense.cells[place["GQA"]].difference == pytest.approx(61 - 62.3)
    assert "test-dev" in dense.cells[place["VQAv2"]].refusal
    trained = lines_of(table)["LLaVA-1.5-7B", "YOPO 25%", ""].cells[place["GQA"]]
    assert "fine-tuned" in trained.refusal
    assert any("repeats" in note for note in table.notes)


@pytest.mark.parametrize(
    "processor, said",
    [({"resize": "crop"}, "ours resize crop"), ({}, "ours resize the processor's own")],
)
def test_images_that_became_other_pixels_are_not_subtracted(processor, said):
    config = load_table_config("visual_table2", chosen={"sections": ["LLaVA-1.5-7B"]})
    gqa = metric("gqa", 0.61, name="exact_match", split="testdev")
    record = recorded(1, gqa, harness="lmms_eval")
    record.config["model"] = {"processor": processor}
    found = {slot: [record] for slot in table_slots(config) if slot.row == "original"}
    line = lines_of(build_table(config, found))["LLaVA-1.5-7B", "original", ""]
    assert line.cells[0].difference is None
    assert f"images: {said}, theirs pad" in line.cells[0].refusal


def test_a_model_that_stands_for_another_is_not_subtracted():
    config = load_table_config("visual_figure7")
    section = next(name for name, each in config.sections.items() if each.differs)
    score = metric("average", 0.8, name="mean", split="mixed", n=2)
    slots = [s for s in table_slots(config) if (s.section, s.row) == (section, "original")]
    table = build_table(config, {slots[0]: [recorded(1, score, harness="lmms_eval")]})
    cell = lines_of(table)[section, "original", ""].cells[0]
    assert cell.published is not None
    assert "InternVL2" in cell.refusal


def test_a_time_is_never_subtracted_and_a_bound_is_no_number():
    config = load_table_config("camera_analysis_time")
    found = {s: [recorded(1, seconds=90.0)] for s in table_slots(config) if s.row == "Camera-P"}
    cell = lines_of(build_table(config, found))[DEEPSEEK, "Camera-P", "20%"].cells[0]
    assert cell.ours.value == 90
    assert (cell.published.text, cell.published.unit) == ("3", "min")
    assert "machine" in cell.refusal
    assert numbers_of.convert_unit(cell.published, "s") == 180


def test_several_seeds_are_a_mean_with_students_interval():
    config = load_table_config("wgsef_grid", "micro")
    slot = next(s for s in table_slots(config) if s.row == "WGSEF" and s.variant == "70%")
    assert [run[-1] for run in slot.runs] == ["seed=1", "seed=2"]
    records = [
        recorded(i, metric("digits", value), harness="images")
        for i, value in enumerate((0.90, 0.94))
    ]
    cell = lines_of(build_table(config, {slot: records}))["micro_resnet", "WGSEF", "70%"].cells[0]
    assert cell.ours.value == pytest.approx(92)
    assert cell.ours.stderr == pytest.approx(2)
    assert cell.ours.high - cell.ours.value == pytest.approx(2 * 12.7062, abs=1e-3)
    assert len(cell.ours.runs) == 2
    alone = build_table(config, {slot: records[:1]})
    assert alone.lines == ()


def test_seeds_of_one_network_are_as_uncertain_as_its_samples():
    config = load_table_config("wgsef_grid", "micro")
    slot = next(s for s in table_slots(config) if s.row == "dense")
    records = [recorded(i, metric("digits", 0.9), harness="images") for i in range(2)]
    same = [r.model_copy(update={"provenance": r.provenance | {"network": "a"}}) for r in records]
    cell = lines_of(build_table(config, {slot: same}))["micro_resnet", "dense", ""].cells[0]
    assert (cell.ours.value, cell.ours.stderr) == (pytest.approx(90), pytest.approx(1))
    assert cell.ours.high - cell.ours.value == pytest.approx(1.96, abs=1e-3)


def micro_camera(**values):
    """`camera_main`'s stand-in with averages of some methods at 40 %, in %."""
    config = load_table_config("camera_main", "micro")
    rows = {"pruned": "Camera-P", "naee": "NAEE", "d2": "D2-MoE", "random": "random experts"}
    by_place = {(s.row, s.variant): s for s in table_slots(config)}
    found = {
        by_place[rows[name], "40%"]: [recorded(i, mean_of_nine(value / 100, stderr=0.002))]
        for i, (name, value) in enumerate(values.items())
    }
    return build_table(config, found)


def test_a_stand_in_says_so_and_is_compared_by_order_alone():
    table = micro_camera(pruned=62.8, naee=56.3, d2=59.4, random=54.6)
    assert table.stand_in
    assert table.file == "camera_main_micro"
    cells = [cell for line in table.lines for cell in line.cells]
    assert all(c.published is None and c.difference is None and c.refusal is None for c in cells)
    by_model = {a.model: a for a in table.agreements}
    deepseek, qwen = by_model[DEEPSEEK], by_model["Qwen2-57B-A14B"]
    assert (deepseek.same, deepseek.reversed, deepseek.close) == (2, 1, 0)
    assert deepseek.ours == ("Camera-P", "D2-MoE", "NAEE")
    assert deepseek.theirs == ("Camera-P", "NAEE", "D2-MoE")
    assert deepseek.tau == pytest.approx(1 / 3)
    assert (qwen.same, qwen.tau) == (3, pytest.approx(1.0))
    assert "Qwen3-30B-A3B" not in by_model
    for form in writers.TABLE_FORMATS.values():
        text = form(table)
        assert "58.58" not in text
    assert "STAND-IN" in writers.as_markdown(table).splitlines()[0]


def test_pairs_too_close_to_call_are_not_counted_for_either_side():
    table = micro_camera(pruned=60.0, naee=59.9, d2=50.0)
    found = next(a for a in table.agreements if a.model == DEEPSEEK)
    assert (found.same, found.reversed, found.close) == (2, 0, 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=7
    )
)
def test_pairs_and_tau_against_counting(triples):
    rated = [
        builder.RatedMethod(str(i), OurValue(float(a), float(e), None, None, ()), float(b))
        for i, (a, b, e) in enumerate(triples)
    ]
    found = builder.count_pairs(rated)
    kinds = []
    for (a, b, e), (c, d, f) in combinations(triples, 2):
        sure = abs(a - c) > 1.959963984540054 * (e**2 + f**2) ** 0.5
        kinds.append("close" if not sure or a == c or b == d else (a > c) == (b > d))
    assert found == (kinds.count(True), kinds.count(False), kinds.count("close"))
    assert builder.kendall_tau(rated[:2]) is None
    signs = [((a > c) - (a < c), (b > d) - (b < d)) for (a, b, _), (c, d, _)
             in combinations(triples, 2)]  # fmt: skip
    scale = (sum(bool(x) for x, _ in signs) * sum(bool(y) for _, y in signs)) ** 0.5
    if len(rated) >= 3 and scale:
        assert builder.kendall_tau(rated) == pytest.approx(sum(x * y for x, y in signs) / scale)


def test_records_are_found_by_what_decides_their_result():
    config = load_table_config("camera_main", "micro")
    run = next(s for s in table_slots(config) if (s.row, s.variant) == ("Camera-P", "40%")).runs[0]
    old = recorded(1, mean_of_nine(0.5), run=run, started="1")
    new = recorded(2, mean_of_nine(0.6), run=(*run, "tracker=none", "threads=7"), started="2")
    others = [
        recorded(3, mean_of_nine(0.1), run=(*run, "method.camera_p.alpha=0.5"), started="3"),
        recorded(4, mean_of_nine(0.1), run=(*run, "benchmark.limit=3"), started="3"),
        recorded(5, mean_of_nine(0.1), run=(*run, "calibration.rows=3"), started="3"),
    ]
    line = lines_of(table_of("camera_main", [*others, new, old], "micro"))[
        "micro_moe", "Camera-P", "40%"
    ]
    assert line.runs == (new.id,)
    real = table_of("camera_main", [old])
    assert not any(line.runs for line in real.lines)
    shown = list(tables_of([old]))
    # A run of CAMERA-P is a row of HEAPr's table as well.
    assert {(t.name, t.stand_in) for t in shown} == {("camera_main", True), ("heapr", True)}


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (["model=./mine"], {"model": {"name": "mine", "path": "./mine"}}),
        (["model=/a/b.gguf"], {"model": {"name": "b", "path": "/a/b.gguf"}}),
        (["model=ORG/NAME"], {"model": {"name": "ORG/NAME"}}),
        (["model=torchvision/vgg11"], {"model": {"name": "torchvision/vgg11"}}),
        (["model=micro_moe", "model.name=x"], {"model": {"name": "x"}}),
        (["model=micro_moe", "model.adapter=a/b"],
         {"model": {"name": "micro_moe+b", "adapter": "a/b"}}),
        (["model=micro_moe", "benchmark=lm_eval"],
         {"model": {"name": "micro_moe"}, "benchmark": {"name": "lm_eval:mmlu+gsm8k"}}),
    ],
)  # fmt: skip
def test_a_record_is_found_by_the_name_that_a_choice_gives_it(run, config):
    whole = {"benchmark": {"name": ""}, "method": {}, **config}
    one = recorded(1).model_copy(update={"config": whole})
    assert matching._choices_of_record(one) == matching._choices_in_overrides(tuple(run))
