"""Paper tables from records: what is subtracted, what is refused and why, and how it is written."""

import csv
import io
import re
import shutil
import subprocess
from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.records import AppliedMethod, DenseModel, Metric, Record
from bench.reporting.tables import (
    TableSlot,
    build_table,
    builder,
    cell_text,
    load_table_config,
    table_names,
    table_of,
    table_scales,
    table_slots,
    tables_of,
    writers,
)
from bench.reporting.tables import numbers as numbers_of
from bench.reporting.tables.cell_text import best_cells
from bench.reporting.tables.published import PublishedCell
from bench.reporting.tables.table import ColumnHead, OurValue, Table, TableCell, TableLine
from bench.reporting.tables.table_config import MICRO
from bench.reporting.tables.writers import print_table
from bench.security import CONFIG_DIR

MODEL = DenseModel(
    name="m", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)


def metric(task, value, name="acc", stderr=0.01, split="test", n=400, shots=0):
    return Metric(
        benchmark="b", task=task, metric=name, filter="none", shots=shots, split=split,
        value=value, stderr=stderr, n=n, higher_is_better=True, headline=True,
    )  # fmt: skip


def mean_of_nine(value, **changes):
    return metric("average", value, **{"name": "mean", "split": "mixed", "n": 9, **changes})


def recorded(number, *metrics, run=(), limit=None, seconds=1.0, harness="lm_eval", started="1"):
    """A record of the run with these overrides, as `bench run` would leave it."""
    if run:
        composed = compose_run_config(list(run))
        config = composed.model_dump(mode="json", exclude={"method"})
        config["method"] = {k: m.model_dump(mode="json") for k, m in composed.method.items()}
        calibrated = composed.uses_calibration
    else:
        config = {"benchmark": {"name": "b", "limit": limit, "harness": harness}}
        calibrated = False
    method = AppliedMethod(name="x", config={}, effect="removed", report={}, seconds=seconds)
    return Record(
        id=f"{number:012x}", started=started, finished="", sweep=None, command="", config=config,
        environment={}, model=MODEL, methods=(method,), metrics=metrics, costs=(),
        provenance={"calibration": "0" if calibrated else None, "prompts": None},
    )  # fmt: skip


def lines_of(table):
    return {(line.section, line.name, line.variant): line for line in table.lines}


DEEPSEEK = "DeepSeek-MoE-16B"


def camera(**found):
    """`camera_main`'s DeepSeek section with some lines recorded, as if all rows were alike."""
    config = load_table_config("camera_main", chosen={"sections": [DEEPSEEK]})
    alike = {name: row.model_copy(update={"differs": None}) for name, row in config.rows.items()}
    config = config.model_copy(update={"rows": alike})
    by_place = {(s.row, s.variant): s for s in table_slots(config)}
    places = {"dense": ("dense", ""), "pruned": ("Camera-P", "40%"), "naee": ("NAEE", "40%")}
    return build_table(config, {by_place[places[name]]: [r] for name, r in found.items()})


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


@pytest.mark.parametrize("name", [n for n in table_names() if n.startswith(("camera", "dartmoqp"))])
def test_every_method_row_says_what_is_not_like_the_source(name):
    config = load_table_config(name)
    columns = [column.differs for column in config.columns.values()]
    _, *methods = config.rows
    published = {
        row for row in methods if row not in ("random experts", "round to nearest", "BitsMoE-style")
        and config.rows[row].run is not None
    }  # fmt: skip
    assert published
    assert all(config.rows[row].differs or all(columns) for row in published)


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


@pytest.mark.parametrize("name", ["camera_main", "camera_deepseek_20", "camera_analysis_time"])
def test_all_rows_remove_a_share_of_the_same_whole(name):
    """Also the controls: a share of the experts' weights is less than one of all weights."""
    config = load_table_config(name)
    for slot in table_slots(config):
        ratios = [part for part in slot.runs[0] if part.startswith("ratio=")]
        bases = [part for part in slot.runs[0] if ".base=" in part]
        assert len(bases) == len(ratios), slot


def test_the_dense_baseline_comes_first_in_every_section():
    for name in table_names():
        for scale in table_scales(name):
            config = load_table_config(name, scale)
            for section in config.sections:
                first = next(slot for slot in table_slots(config) if slot.section == section)
                assert first.variant == ""
                assert first.row in ("dense", "original", "vanilla")


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


def scored(location, origin, task, limit=None, **more):
    """A record of one task on the given data."""
    record = recorded(3, metric(task, 0.5, **more), limit=limit)
    data = {task: {"origin": origin, "location": location}}
    return record.model_copy(update={"provenance": {"data": data}})


@pytest.mark.parametrize("form", ["md", "tex", "html"])
def test_a_stand_in_column_is_not_called_by_the_real_datas_name(form):
    config = load_table_config("camera_main", "micro")
    slot = next(s for s in table_slots(config) if s.row == "dense")
    english = scored("english", "embedded", "english", name="perplexity")
    text = writers.TABLE_FORMATS[form](build_table(config, {slot: [english]}))
    assert "embedded english perplexity" in text
    assert "Wiki2" not in text
    empty = build_table(config, {})
    assert cell_text.column_text(empty.columns[1]) == "embedded english perplexity"
    rows = writers.table_rows(build_table(config, {slot: [english]}))
    assert {row["column"] for row in rows} == {"avg", "embedded english"}


@pytest.mark.parametrize(
    ("location", "origin", "limit", "head"),
    [
        ("Salesforce/wikitext", "hub", None, "Wiki2 perplexity"),
        ("Salesforce/wikitext", "hub", 10, "wikitext2, limit 10 perplexity"),
        ("/data/prose.txt", "file", None, "wikitext2 from prose.txt perplexity"),
        ("/data/wikitext2.parquet", "file", 5, "wikitext2.parquet, limit 5 perplexity"),
        ("english", "embedded", None, "wikitext2 from embedded english perplexity"),
    ],
)
def test_a_column_says_what_was_scored(location, origin, limit, head):
    config = load_table_config("camera_main")
    record = scored(location, origin, "wikitext2", limit, name="perplexity")
    table = build_table(config, {table_slots(config)[0]: [record]})
    assert cell_text.column_text(table.columns[1]) == head


def test_a_line_says_that_its_network_is_untrained():
    config = load_table_config("wgsef_grid", "micro")
    slot = next(s for s in table_slots(config) if s.row == "dense")
    fresh = MODEL.model_copy(update={"source": "fresh:lenet5"})
    run = recorded(4, metric("digits", 0.1)).model_copy(update={"model": fresh, "methods": ()})
    table = build_table(config, {slot: [run] * len(slot.runs)})
    for form in ("md", "tex", "html"):
        assert "dense (untrained)" in writers.TABLE_FORMATS[form](table)


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


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", table_names())
def test_runs_of_every_table_compose(name):
    """Each row and each section once; variants differ in numbers only."""
    for scale in table_scales(name):
        ours = [slot for slot in table_slots(load_table_config(name, scale)) if slot.runs]
        rows = {slot.row: slot.runs[0] for slot in ours}
        sections = {slot.section: slot.runs[0] for slot in ours}
        assert rows
        for run in {*rows.values(), *sections.values()}:
            assert "$" not in " ".join(run)
            compose_run_config(list(run))


def test_every_published_name_of_a_table_exists():
    """A misspelt row or column would only be an empty cell."""
    for name in set(table_names()) - {"wgsef_grid"}:
        config = load_table_config(name)
        if config.published is None:
            continue
        table = build_table(config, {})
        ours_alone = {"random experts", "round to nearest", "downsample", "bytes", "dense"}
        if name == "community_tokens":
            ours_alone |= {"PruMerge", "PruMerge+", "PruMerge+ as released", "HiPrune", "VScan"}
            ours_alone |= {"FlowCut"}
            ours_alone |= {"PACT", "VTW", "DyCoke", "HoliTom", "random tokens"}
        if name == "heapr":
            ours_alone |= {"CAMERA-P"}
        elif name == "moe_slimming":
            ours_alone |= {"CAMERA-P", "HEAPr", "MoE-Slimming second order"}
        else:
            ours_alone |= {"HEAPr", "MoNE", "MoE-Slimming", "BitsMoE-style"}
        there = {line.name for line in table.lines}
        assert set(config.rows) - there <= ours_alone
        for place, head in enumerate(table.columns):
            shown = any(line.cells[place].published for line in table.lines)
            unknown = {"OBQA", "RTE", "PIQA", "ARC-c"} if name == "camera_deepseek_20" else set()
            unknown |= {"Wiki2", "bytes"} if name == "camera_q_225" else set()
            assert shown or head.name in unknown, (name, head.name)


def written(form):
    table = camera(
        dense=recorded(7, mean_of_nine(0.62)),
        pruned=recorded(0xABC, mean_of_nine(0.59, stderr=0.004)),
        naee=recorded(9, mean_of_nine(0.55), limit=4),
    )
    return table, writers.TABLE_FORMATS[form](table)


def test_csv_has_one_line_per_cell_with_source_and_runs():
    table, text = written("csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(table.lines) * len(table.columns)
    row = next(
        r for r in rows if (r["row"], r["variant"], r["column"]) == ("Camera-P", "40%", "avg")
    )
    assert (row["theirs"], row["source"], row["trust"]) == (
        "58.58",
        "camera_papernotes",
        "secondary",
    )
    assert float(row["ours"]) == pytest.approx(59)
    assert row["runs"] == "000000000abc"
    assert row["inside"] == "True"
    empty = next(r for r in rows if r["row"] == "D2-MoE" and r["variant"] == "40%")
    assert empty["ours"] == ""


def test_markdown_links_cells_to_their_runs():
    table, text = written("md")
    assert "[59.00 ±0.40](../runs/000000000abc/record.json)" in text
    assert "58.58ˢ" in text
    assert "+0.42 in" in text
    assert "not subtracted [1]" in text
    assert "[1] avg: ours covers only the first 4 samples" in text
    assert f"- {table.notes[0]}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1


def test_latex_is_booktabs_and_escapes_what_latex_would_read():
    _, text = written("tex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    assert not re.search(r"(?<!\\)[%_&#](?! )", text.replace(" & ", ""))
    assert r"58.58\textsuperscript{s}" in text
    rows = [line for line in text.splitlines() if " & " in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {3}
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"\label{tab:camera-main}" in text


TEX = next(filter(shutil.which, ("tectonic", "pdflatex")), None)


@pytest.mark.skipif(TEX is None, reason="neither tectonic nor pdflatex is installed")
def test_latex_compiles(tmp_path):
    _, text = written("tex")
    preamble = r"\documentclass{article}\usepackage{booktabs}\usepackage[T1]{fontenc}"
    file = tmp_path / "table.tex"
    file.write_text(f"{preamble}\\begin{{document}}\n{text}\\end{{document}}\n")
    options = ["-interaction=nonstopmode", "-halt-on-error"] if TEX == "pdflatex" else []
    done = subprocess.run([TEX, *options, file], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert file.with_suffix(".pdf").stat().st_size > 1000


def test_counted_costs_are_columns_on_request():
    asked = load_table_config("camera_main", "micro", {"columns": ["avg"], "costs": ["FLOPs"]})
    assert list(asked.columns) == ["avg", "FLOPs"]
    assert asked.columns["FLOPs"].lower_is_better
    assert "FLOPs" not in load_table_config("camera_main", "micro").columns
    with pytest.raises(UserError, match="parameters"):
        load_table_config("camera_main", "micro", {"costs": ["params"]})


@pytest.mark.parametrize(("form", "bold", "plain"), [
    ("tex", r"\textbf{59.00 $\pm$0.40}", r"\textbf{62"),
    ("md", "**[59.00 ±0.40](../runs/000000000abc/record.json)**", "**[62"),
    ("html", '">59.00 ±0.40</a></b>', "<b><a>62"),
])  # fmt: skip
def test_our_best_of_a_variant_is_bold(form, bold, plain):
    # NAEE's number is over other samples, and still the other one that is compared with.
    _, text = written(form)
    assert bold in text
    assert plain not in text


def ours(value):
    return OurValue(float(value), None, None, None, ())


@given(st.lists(st.tuples(st.sampled_from(["", "20%", "40%"]), st.integers(0, 3)), max_size=8),
       st.booleans())  # fmt: skip
def test_the_best_are_those_that_none_of_the_same_variant_beats(lines, lower):
    made = [
        TableLine("s", variant, str(at), (), (TableCell(ours(value)),))
        for at, (variant, value) in enumerate(lines)
    ]
    table = Table("t", "T", False, (ColumnHead("c", "%", lower),), tuple(made), (), ())
    expected = {
        (at, 0)
        for at, (variant, value) in enumerate(lines)
        if variant
        and len(rivals := [v for name, v in lines if name == variant]) > 1
        and value == (min if lower else max)(rivals)
    }
    assert best_cells(table) == expected


def test_html_is_one_whole_page_that_links_to_records():
    from html.parser import HTMLParser

    _, text = written("html")
    stack, links = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br"):
                stack.append(tag)
            links.extend(value for key, value in attributes if key == "href")

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Reader().feed(text)
    assert stack == []
    assert "../runs/000000000abc/record.json" in links
    assert "<script" not in text
    assert "http" not in text


@pytest.mark.parametrize("width", [70, 400])
def test_nothing_is_cut_on_a_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    config = load_table_config("camera_deepseek_20")
    print_table(build_table(config, {}))
    out = capsys.readouterr().out
    assert "…" not in out
    for value in ("72.45", "69.32ᶜ", "31.46", "12.62", "61.03ˢ"):
        assert value in out


@pytest.mark.parametrize(
    ("name", "scale", "chosen", "said"),
    [
        ("camera_man", None, {}, "did you mean 'camera_main'"),
        ("camera_main", "macro", {}, "scale=micro"),
        ("camera_main", None, {"rows": ["Camera"]}, "unknown name in rows 'Camera'"),
        ("camera_main", None, {"sections": ["micro_moe"]}, "unknown name in sections"),
    ],
)
def test_what_does_not_exist_is_named(name, scale, chosen, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_table_config(name, scale, chosen)


def test_a_line_knows_where_it_is_not_ours():
    community = table_slots(load_table_config("community_tokens"))
    assert TableSlot("LLaVA-1.5-7B, as copied by later papers", "SIEVE", "64", ()) in community
    micro = {
        (s.row, s.variant): s.runs
        for s in table_slots(load_table_config("community_tokens", "micro"))
    }
    assert micro["PyramidDrop", "64"] == ()
    assert micro["PyramidDrop", "192"] != ()


@pytest.mark.parametrize("scale", [None, MICRO])
def test_the_community_table_has_a_row_for_every_method_that_removes_tokens(scale):
    removing = {
        file.stem
        for file in (CONFIG_DIR / "method").glob("*.yaml")
        if str(OmegaConf.load(file).get("_target_")).startswith("methods.token_pruning.")
    }
    ours = [slot for slot in table_slots(load_table_config("community_tokens", scale)) if slot.runs]
    shown = {argument.removeprefix("method=") for slot in ours for argument in slot.runs[0]}
    assert len(removing) > 14 and removing <= shown


@pytest.mark.broad
def test_every_method_of_a_stand_in_fits_its_model():
    from bench.models import loading, source
    from bench.models.structure.model_structure import inspect_model

    anatomies = {}
    for name in table_names():
        if MICRO not in table_scales(name):
            continue
        ours = [slot for slot in table_slots(load_table_config(name, MICRO)) if slot.runs]
        for run in {slot.row: slot.runs[0] for slot in ours}.values():
            config = compose_run_config(list(run))
            if config.model.name not in anatomies:
                network = loading.skeleton(source.resolve_model(config.model, offline=True))
                anatomies[config.model.name] = inspect_model(network)
            for method in config.method.values():
                method.check(anatomies[config.model.name])
    assert set(anatomies) == {"micro_moe", "micro_llava", "micro_resnet"}


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
    assert builder._choices_of_record(one) == builder._choices_in_overrides(tuple(run))
