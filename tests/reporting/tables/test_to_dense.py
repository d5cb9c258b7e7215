"""Changes against the dense model as columns: values, signs, and when there are none."""

import csv
import io
import statistics

import pytest

from bench.errors import UserError
from bench.reporting.tables import build_table, load_table_config, table_slots, writers
from bench.reporting.tables.cell_text import best_cells
from bench.reporting.tables.table_config import TableConfig
from tests.reporting.html.synthetic_records import record

COLUMNS = {
    "boolq": {"task": "boolq", "metric": "acc", "split": "test"},
    "FLOPs": {
        "quantity": "flops", "scope": "forward", "unit": "FLOP", "lower_is_better": True,
    },
}  # fmt: skip


def table(found, seeds=(), to_dense=("boolq", "FLOPs")):
    """A table of one model whose rows have these records, one per seed."""
    config = TableConfig.model_validate({
        "name": "own", "title": "Own", "sections": {"tiny": {}}, "variants": {"40%": {}},
        "rows": {
            "dense": {"run": ["method=dense"], "variants": False},
            **{name: {"run": [f"method={name}"]} for name in found if name != "dense"},
        },
        "columns": COLUMNS, "seeds": seeds, "to_dense": to_dense,
    })  # fmt: skip
    slots = {slot.row: slot for slot in table_slots(config)}
    return build_table(config, {slots[name]: records for name, records in found.items()})


def change(made, row, column):
    (line,) = (line for line in made.lines if line.name == row)
    return line.cells[[head.name for head in made.columns].index(f"{column} to dense")]


def flops(run):
    return run.cost("flops", "forward 1x512").value


@pytest.fixture(scope="module")
def runs():
    return {"dense": [record(0)], "naee": [record(1, method="naee")],
            "camera_p": [record(2, method="camera_p")]}  # fmt: skip


def test_scores_change_by_points_and_costs_by_a_share(runs):
    made = table(runs)
    (dense,), (naee,) = runs["dense"], runs["naee"]
    assert [head.name for head in made.columns] == [
        "boolq", "boolq to dense", "FLOPs", "FLOPs to dense",
    ]  # fmt: skip
    points = 100 * (naee.metric("boolq").value - dense.metric("boolq").value)
    assert change(made, "naee", "boolq").ours.value == pytest.approx(points)
    share = 100 * (flops(naee) / flops(dense) - 1)
    assert change(made, "naee", "FLOPs").ours.value == pytest.approx(share)
    # Two runs over the same samples: their errors do not add up, and no record can pair them.
    assert change(made, "naee", "boolq").ours.stderr is None
    assert change(made, "dense", "boolq").ours is None


@pytest.mark.parametrize("form", ["md", "tex", "html", "csv"])
def test_every_format_has_them(runs, form):
    made = table(runs)
    text = writers.TABLE_FORMATS[form](made)
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        (found,) = (r for r in rows if (r["row"], r["column"]) == ("naee", "FLOPs to dense"))
        assert float(found["ours"]) == pytest.approx(change(made, "naee", "FLOPs").ours.value)
        return
    percent = r"\%" if form == "tex" else "%"
    assert f"boolq to dense {percent}" in text
    for column in COLUMNS:
        assert f"{change(made, 'naee', column).ours.value:+.2f}" in text


def test_the_best_change_is_that_of_the_best_number(runs):
    best = best_cells(table(runs))
    assert {(line, 1) for line, column in best if column == 0} == {
        (line, column) for line, column in best if column == 1
    }
    assert {(line, 3) for line, column in best if column == 2} == {
        (line, column) for line, column in best if column == 3
    }
    assert len(best) == 4


def test_seeds_are_paired(runs):
    dense = [record(number) for number in (10, 11, 12)]
    pruned = [record(number, method="naee") for number in (20, 21, 22)]
    made = table({"dense": dense, "naee": pruned}, seeds=(1, 2, 3))
    changes = [
        100 * (run.metric("boolq").value - before.metric("boolq").value)
        for run, before in zip(pruned, dense, strict=True)
    ]
    found = change(made, "naee", "boolq").ours
    assert found.value == pytest.approx(statistics.mean(changes))
    assert found.stderr == pytest.approx(statistics.stdev(changes) / 3**0.5)
    # Student's t with two degrees of freedom.
    assert found.high - found.low == pytest.approx(2 * 4.302653 * found.stderr)


def test_numbers_of_different_identity_are_not_subtracted(runs):
    (dense,) = runs["dense"]
    data = {"boolq": {"fingerprint": "e" * 64}}
    other = dense.model_copy(update={"provenance": {"data": data}})
    cell = change(table({**runs, "dense": [other]}), "naee", "boolq")
    assert cell.ours is None
    assert cell.refusal == "boolq to dense: the dense run has a different data fingerprint"


def test_without_a_dense_line_there_is_nothing_to_compare_with(runs):
    made = table({"naee": runs["naee"]})
    assert change(made, "naee", "boolq").ours is None


def test_they_are_asked_for_by_the_names_of_columns():
    chosen = {"columns": ["avg"], "costs": ["FLOPs"], "to_dense": ["avg", "FLOPs"]}
    assert load_table_config("camera_main", "micro", chosen).to_dense == ("avg", "FLOPs")
    with pytest.raises(UserError, match="name in to_dense"):
        load_table_config("camera_main", "micro", {"to_dense": ["average"]})
