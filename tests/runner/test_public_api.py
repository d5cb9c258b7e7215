"""The names of `bench`: runs, comparisons and figures as objects."""

import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import bench
import bench.method
from bench.errors import UserError
from bench.records import Store
from bench.runner.identity import identity_differences
from bench.runner.session import Session

SMALL = [
    "model=micro_lenet", "benchmark=images", "benchmark.limit=4", "threads=1", "tracker=none",
]  # fmt: skip

pytestmark = pytest.mark.own_session


@pytest.mark.broad
def test_runs_are_compared_and_drawn(tmp_path):
    with bench.Session() as session:
        records = bench.run(SMALL, over={"seed": [1, 2]}, results_dir=tmp_path, session=session)
    first, second = (record.id for record in records)
    assert list(bench.run(" ".join(SMALL), seed=1, results_dir=tmp_path)) == [records[0]]
    (difference,) = identity_differences(*records)
    assert difference == {"part": "seed", first: "1", second: "2"}
    comparison = bench.compare([first[:8], second], baseline=first, results_dir=tmp_path)
    assert comparison.baseline.id == first
    assert [candidate.id for candidate in comparison.candidates] == [second]
    assert bench.compare(records, baseline=records[0], results_dir=tmp_path) == comparison
    # Records know where they lie.
    assert bench.compare(records, baseline=records[0]) == comparison
    assert isinstance(bench.plot("front", records), Figure)
    assert repr(comparison).count("\n") == len(comparison.contrasts)
    assert records[1].label in repr(comparison)
    for shown in (records, records[0], comparison):
        assert records[1].label in shown._repr_html_()
    assert isinstance(bench.plot("front", results_dir=tmp_path), Figure)
    assert isinstance(bench.plot("front", records, results_dir=tmp_path), Figure)
    assert set(bench.records.load(tmp_path).run) == {first, second}
    with pytest.raises(UserError, match="did you mean 'front'"):
        bench.plot("frond", results_dir=tmp_path)


def test_a_store_opens_by_the_name_of_its_folder(tmp_path):
    assert Store(str(tmp_path)).root == tmp_path


def test_a_notebook_completes_the_public_names_only():
    assert dir(bench) == sorted(bench.__all__)
    assert all(getattr(bench, name) for name in dir(bench))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bench.run(over=[1]), r"over=\[1\] is not a mapping of keys to lists"),
        (lambda: bench.run("model='micro_moe"), "model='micro_moe\": No closing quotation"),
        (lambda: bench.compare([]), "no run is named: name at least two"),
        (lambda: bench.compare(None), "runs=None is not a list"),
        (lambda: bench.compare(types.SimpleNamespace(id="1a2b"), "3c4d"), "runs='1a2b' is not a"),
        (lambda: bench.plot("front", None), "runs=None is not a list"),
    ],
)
def test_wrong_arguments_are_one_sentence(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_classes_are_those_of_their_modules():
    assert bench.Session is Session
    assert (bench.Method, bench.Context) == (bench.method.Method, bench.method.Context)
    with pytest.raises(AttributeError, match="no attribute 'Methods'"):
        _ = bench.Methods


def test_runs_are_looked_up_where_their_records_were_written():
    def record(folder):
        return types.SimpleNamespace(id="1a2b", config={"results_dir": folder})

    assert bench._results_folder(["1a2b"], None) == Path("results")
    assert bench._results_folder([record("mine"), "3c4d"], None) == Path("mine")
    assert bench._results_folder([record("mine")], "other") == Path("other")
    # Two folders have no common one.
    assert bench._results_folder([record("a"), record("b")], None) == Path("results")
