"""A real W&B run, offline, inside the results folder; a tracker that fails loses nothing."""

import json
from unittest.mock import MagicMock

import pytest
import wandb

from bench.records import AppliedMethod, Cost, DenseModel, Metric, MissingMeasurement, Record, Store
from bench.schema import TrackerConfig
from bench.tracking import wandb_run as tracker
from bench.tracking.tracker import track
from tests.tracking.offline import entries


@pytest.fixture
def record():
    metric = Metric(
        benchmark="b", task="arc_easy", metric="acc", filter="none", shots=0, split="test",
        value=0.625, stderr=0.1, n=8, higher_is_better=True, headline=True,
    )  # fmt: skip
    return Record(
        id="c" * 12, started="2026-01-01", finished="2026-01-01", sweep="sweep-1",
        command="bench run", environment={"versions": {"torch": "1"}},
        config={"seed": 3, "tracker": {}, "benchmark": {"name": "b"}},
        model=DenseModel(
            name="tiny", source="s", revision=None, fingerprint="f", architecture="A",
            parameters=7, bytes=28,
        ),
        methods=(), metrics=(metric,), provenance={},
        costs=(
            Cost(scope="model", quantity="bytes", unit="B", value=28.0, how="counted"),
            Cost(
                scope="prefill 1x8", quantity="latency", unit="s", value=0.5, how="measured",
                parts={"p10": 0.25, "p90": 0.75}, note="the machine was loaded",
            ),
        ),
        missing=(MissingMeasurement(scope="1x8", quantity="energy", reason="no counter"),),
    )  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_a_cost_that_was_had_twice_keeps_both_numbers(record, order):
    def flops(value, how):
        return Cost(scope="token", quantity="flops", unit="FLOP", value=value, how=how)

    both = (flops(8.0, "counted"), flops(9.0, "analytic"))[::order]
    values = tracker.wandb_summary(record.model_copy(update={"costs": both}))
    assert values["cost/token/flops"] == 8.0
    assert values["cost/token/flops/analytic"] == 9.0


def test_filters_and_shots_of_one_metric_stay_apart(record):
    (acc,) = record.metrics
    match = acc.model_copy(update={"task": "gsm8k", "metric": "exact_match", "shots": 5})
    taken = [("strict-match", 5, 0.1), ("flexible-extract", 5, 0.6), ("strict-match", 0, 0.05)]
    metrics = tuple(
        match.model_copy(update={"filter": name, "shots": shots, "value": value})
        for name, shots, value in taken
    )
    assert tracker.wandb_summary(record.model_copy(update={"metrics": metrics, "costs": ()})) == {
        "gsm8k/exact_match,strict-match,5-shot": 0.1,
        "gsm8k/exact_match,flexible-extract,5-shot": 0.6,
        "gsm8k/exact_match,strict-match,0-shot": 0.05,
    }


@pytest.mark.parametrize("value", [0.5, None])
def test_a_number_with_missing_answers_is_sent_with_their_count(record, value):
    (acc,) = record.metrics
    holed = acc.model_copy(update={"value": value, "n": 38, "missing": 2})
    sent = tracker.wandb_summary(record.model_copy(update={"metrics": (holed,), "costs": ()}))
    key = f"{acc.task}/{acc.metric},{acc.filter},{acc.shots}-shot"
    assert sent == {f"{key}/n": 38, f"{key}/missing": 2} | ({key: value} if value else {})


@pytest.fixture
def store(tmp_path, record):
    store = Store(tmp_path / "results")
    store.write(record, [{"task": "arc_easy", "doc_id": 0}], "seed: 3\n")
    return store


def sent_by(folder):
    """Read back what an offline run folder holds, with W&B's own reader."""
    (file,) = folder.rglob("run-*.wandb")
    return entries(file)


def test_an_offline_run_holds_config_numbers_tables_and_the_record(store, record):
    assert track(record, store, TrackerConfig(mode="offline")) is None
    note = json.loads((store.root / "tracked" / f"{record.id}.json").read_text())
    assert note["run"] == record.id
    sent = sent_by(store.root / "wandb_home")
    (run,) = [e.run for e in sent if e.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.project, run.display_name) == ("sweep-1", "slimbench", "tiny dense")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 3
    assert config["record"] == run.run_id == record.id
    assert config["benchmark.name"] == "b"
    assert config["environment.versions.torch"] == "1"
    summary = {
        item.key or "/".join(item.nested_key): item.value_json
        for e in sent
        if e.WhichOneof("record_type") == "summary"
        for item in e.summary.update
    }
    assert summary["arc_easy/acc,none,0-shot"] == "0.625"
    assert summary["cost/model/bytes"] in ("28", "28.0")
    artifacts = [e for e in sent if "artifact" in str(e.WhichOneof("record_type"))]
    names = str(sent)
    assert artifacts or f"record-{record.id}" in names
    assert "record.json" in names
    assert "samples.parquet" in names
    assert summary["cost/prefill 1x8/latency"] == "0.5"
    tables = {
        file.name.partition("_")[0]: json.loads(file.read_text())
        for file in (store.root / "wandb_home").rglob("*.table.json")
        if "media" in file.parts
    }
    costs = [
        dict(zip(tables["costs"]["columns"], row, strict=True)) for row in tables["costs"]["data"]
    ]
    assert costs[1]["note"] == "the machine was loaded"
    assert json.loads(costs[1]["parts"]) == {"p10": 0.25, "p90": 0.75}
    assert tables["missing"]["data"] == [["1x8", "energy", "no counter", None]]


@pytest.mark.parametrize(("mode", "resume"), [("online", "allow"), ("offline", None)])
def test_only_an_online_run_resumes_since_wandb_warns_of_it_offline(
    tmp_path, monkeypatch, mode, resume
):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **words: given.update(words) or MagicMock())
    with tracker.open_wandb_run(
        TrackerConfig(mode=mode), tmp_path, name="n", job_type="run", run_id="a"
    ):
        assert given["resume"] == resume


def test_sending_again_continues_the_same_run(store, record):
    for _ in range(2):
        assert track(record, store, TrackerConfig(mode="offline")) is None
    files = (store.root / "wandb_home").rglob("run-*.wandb")
    runs = [e.run.run_id for file in files for e in entries(file)
            if e.WhichOneof("record_type") == "run"]  # fmt: skip
    assert set(runs) == {record.id}


def test_the_agent_of_a_sweep_finds_the_run_that_it_watches(store, record, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "swept")
    monkeypatch.setenv("WANDB_RUN_ID", "watched")
    assert track(record, store, TrackerConfig(mode="offline")) is None
    sent = sent_by(store.root / "wandb_home")
    (run,) = [e.run for e in sent if e.WhichOneof("record_type") == "run"]
    assert run.run_id == "watched"


def test_columns_have_short_names_and_errors(record):
    average = record.metrics[0].model_copy(
        update={"task": "average", "metric": "mean", "value": 0.5, "stderr": 0.01}
    )
    method = AppliedMethod(
        name="camera_p", config={"ratio": 0.4}, effect="removed", report={}, seconds=1.0
    )
    whole = record.model_copy(update={"metrics": (average, *record.metrics), "methods": (method,)})
    columns = tracker.summary_columns(whole)
    first = record.metrics[0]
    assert columns[first.task] == first.value
    assert (columns["score"], columns["score_stderr"]) == (0.5, 0.01)
    assert (columns["method"], columns["ratio"], columns["effect"]) == ("camera_p", 0.4, "removed")
    assert columns["bytes"] == record.cost("bytes").value
    assert all(isinstance(value, str | float | int) for value in columns.values())


def test_two_records_in_one_process_are_two_runs(store, record):
    other = record.model_copy(update={"id": "d" * 12})
    store.write(other, [], "")
    for each in (record, other):
        assert track(each, store, TrackerConfig(mode="offline")) is None
    assert len(list((store.root / "wandb_home").rglob("run-*.wandb"))) == 2


def test_a_tracker_that_fails_says_so_and_loses_nothing(store, record, monkeypatch):
    def broken(*_):
        raise ConnectionError("no such host")

    monkeypatch.setattr(tracker, "send_record", broken)
    said = track(record, store, TrackerConfig())
    assert "no such host" in said
    assert f"bench track {record.id}" in said
    assert store.find(record.id) == record
    assert not (store.root / "tracked").exists()


def test_no_tracker_writes_nothing(store, record):
    assert track(record, store, TrackerConfig(kind="none")) is None
    assert not (store.root / "tracked").exists()
    assert not (store.root / "wandb_home").exists()


def test_a_history_becomes_curves_over_the_methods_own_epochs(store, record):
    lines = [{"epoch": n, "alive": 10 - n, "accuracy": 0.5 + n / 10} for n in (1, 2, 3)]
    method = AppliedMethod(
        name="wgsef", config={}, effect="removed", report={"history": lines}, seconds=1.0
    )
    trained = record.model_copy(update={"id": "e" * 12, "methods": (method,)})
    store.write(trained, [], "")
    assert track(trained, store, TrackerConfig(mode="offline")) is None
    rows = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in e.history.item
        }
        for e in sent_by(store.root / "wandb_home")
        if e.WhichOneof("record_type") == "history"
    ]
    curve = [(r["wgsef/epoch"], r["wgsef/alive"]) for r in rows if "wgsef/alive" in r]
    assert curve == [(1, 9), (2, 8), (3, 7)]


def test_a_disabled_client_keeps_the_run_nowhere(store, record, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(record, store, TrackerConfig()) is None
    note = json.loads((store.root / "tracked" / f"{record.id}.json").read_text())
    assert note["kept"] is None
