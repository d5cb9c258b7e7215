"""Which samples a report carries: the same questions in every run, whatever the answers were."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bench.records import Store
from bench.records.files import MAX_WARNINGS
from bench.records.store import SAMPLES
from bench.reporting.html.samples import (
    MAX_TEXT_LENGTH,
    SampleShare,
    evenly_spaced,
    readable_table,
    sample_chunks,
)
from bench.reporting.leaderboard import build_leaderboard
from tests.reporting.html.synthetic_records import TASKS, fill, record, samples


@given(st.integers(0, 500), st.integers(1, 60))
def test_positions_are_spaced_evenly(total, count):
    places = evenly_spaced(list(range(total)), count)
    assert len(places) == min(total, count)
    assert places == sorted(set(places))
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert not places or places[0] == 0


def test_runs_of_a_setting_show_the_same_questions(tmp_path):
    store = Store(tmp_path)
    records = fill(tmp_path, 3, models=("tiny",))
    (chunk,) = sample_chunks(build_leaderboard(records), store, SampleShare(per_run=16))
    asked = [
        [(sample["task"], sample["doc"]) for sample in run["samples"]]
        for run in chunk["runs"].values()
    ]
    assert asked[0] == asked[1] == asked[2]
    assert {task for task, _ in asked[0]} == set(TASKS)
    assert all(run["total"] == 30 * len(TASKS) for run in chunk["runs"].values())
    # Two questions of eight tasks and two choices: each text is stored once.
    assert len(chunk["texts"]) == len(set(chunk["texts"])) == 16 + 2


def test_the_newest_runs_and_their_dense_run_have_samples(tmp_path):
    store = Store(tmp_path)
    records = fill(tmp_path, 8, models=("tiny",))
    shown = [
        run
        for chunk in sample_chunks(
            build_leaderboard(records), store, SampleShare(per_run=8, runs=2)
        )
        for run in chunk["runs"]
    ]
    assert set(shown) == {records[0].id, records[6].id, records[7].id}
    assert list(sample_chunks(build_leaderboard(records), store, SampleShare(per_run=0))) == []


def test_answers_and_scores_are_those_of_the_file(tmp_path):
    store = Store(tmp_path)
    one = record(1, method="camera_p")
    rows = samples(one, 4)
    store.write(one, rows, "")
    (chunk,) = sample_chunks(build_leaderboard([one]), store, SampleShare(per_run=1000))
    shown, texts = chunk["runs"][one.id], chunk["texts"]
    assert shown["total"] == len(shown["samples"]) == len(rows)
    for row, entry in zip(rows, shown["samples"], strict=True):
        assert entry["scores"] == {"acc": row["acc"]}
        assert entry["logs"] == row["loglikelihoods"]
        assert texts[entry["prompt"]] == row["prompt"]
        assert [texts[choice] for choice in entry["choices"]] == row["choices"]


def test_missing_and_broken_files_show_nothing_and_are_named(tmp_path, capsys):
    assert readable_table(tmp_path / "a" / "none.parquet") is None
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    assert readable_table(tmp_path / "bad.parquet") is None
    warned = capsys.readouterr().err
    assert "none.parquet is left out: No such file" in warned
    assert "bad.parquet is left out: " in warned
    for number in range(2 * MAX_WARNINGS):
        readable_table(tmp_path / "runs" / str(number) / "none.parquet")
    assert capsys.readouterr().err.count("is left out") == MAX_WARNINGS


def test_a_run_without_samples_shows_nothing(tmp_path, capsys):
    store = Store(tmp_path)
    store.write(record(0), [], "")
    assert readable_table(store.folder(record(0).id) / SAMPLES) is None
    (chunk,) = sample_chunks(build_leaderboard([record(0)]), store, SampleShare())
    assert chunk["runs"][record(0).id] == {"total": 0, "samples": [], "outcomes": {}}
    assert not capsys.readouterr().err


def test_long_texts_are_cut(tmp_path):
    store = Store(tmp_path)
    one = record(0)
    store.write(one, samples(one, 1, prompt="x" * 9000), "")
    (chunk,) = sample_chunks(build_leaderboard([one]), store, SampleShare())
    assert max(map(len, chunk["texts"])) == MAX_TEXT_LENGTH
