"""Searches as their sweeper writes them: read, skipped when damaged, and their best values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UserError
from bench.reporting.study import best_so_far, pareto_trials, read_study, studies_in
from tests.reporting.html.synthetic_records import fill, write_search


@pytest.fixture
def results(tmp_path):
    write_search(tmp_path, "tiny", fill(tmp_path, 5, per_task=0, models=("tiny",)), sweep="2026-1")
    return tmp_path


def test_a_resumed_search_is_listed_once_with_all_its_sweeps(results):
    folder = results / "sweeps"
    study = read_study(folder / "2026-1")
    (folder / "2026-2").mkdir()
    longer = {**study, "trials": [*study["trials"], study["trials"][0]]}
    (folder / "2026-2" / "study.json").write_text(json.dumps(longer))
    (found,) = studies_in(results)
    assert found.sweeps == ("2026-2", "2026-1")
    assert len(found.report["trials"]) == len(study["trials"]) + 1


def test_a_damaged_search_is_left_out_with_a_warning(results, capsys):
    for name, text in {
        "a": "{",
        "b": json.dumps({"study": "b", "objectives": {}, "trials": []}),
        "c": json.dumps({"study": "c", "objectives": {"average": "up"}, "trials": []}),
        "d": json.dumps({
            "study": "d", "objectives": {"average": "maximize"},
            "trials": [
                {"state": "complete", "front": True, "values": [], "params": {}, "run": None}
            ],
        }),
    }.items():  # fmt: skip
        (results / "sweeps" / name).mkdir()
        (results / "sweeps" / name / "study.json").write_text(text)
    assert [found.report["study"] for found in studies_in(results)] == ["tiny"]
    assert capsys.readouterr().err.count("is left out") == 4
    with pytest.raises(UserError, match=r"study\.json cannot be read: "):
        read_study(results / "sweeps" / "d")


VALUE = st.one_of(st.none(), st.floats(-10, 10))


@given(st.lists(VALUE), st.sampled_from(["maximize", "minimize"]))
def test_best_values_are_those_of_the_definition(values, direction):
    trials = [
        {"state": "pruned" if v is None else "complete", "values": [] if v is None else [0.0, v],
         "run": None, "front": False, "params": {}}
        for v in values
    ]  # fmt: skip
    study = {"study": "s", "objectives": {"a": "maximize", "b": direction}, "trials": trials}
    choose = max if direction == "maximize" else min
    for number, best in enumerate(best_so_far(study, "b")):
        seen = [v for v in values[: number + 1] if v is not None]
        assert best == (choose(seen) if seen else None)


def test_the_front_is_listed_best_first(results):
    rows = pareto_trials(read_study(results / "sweeps" / "2026-1"))
    assert [row["average"] for row in rows] == sorted((r["average"] for r in rows), reverse=True)
    assert all("camera_p.level" in row for row in rows)
