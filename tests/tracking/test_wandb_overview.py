"""A project rebuilt from records, offline: what W&B's own reader finds in the run's folder."""

import json

import pytest

from bench.cli import main
from bench.records import Store
from bench.reporting.html import write_report
from bench.reporting.leaderboard import build_leaderboard
from bench.reporting.wandb_sync import build_overview, sync_all
from bench.schema import TrackerConfig
from bench.tracking.tracker import track_overview
from bench.tracking.wandb_run import OVERVIEW_ID
from tests.reporting.html.synthetic_records import fill, paper_table
from tests.tracking.offline import entries


@pytest.fixture
def store(tmp_path):
    fill(tmp_path, 6, models=("tiny",))
    return Store(tmp_path)


def offline_runs(home):
    """Read every offline run below a folder: its type, its history by key, its folder."""
    for file in home.rglob("run-*.wandb"):
        kind, logged = "", {}
        for entry in entries(file):
            if entry.WhichOneof("record_type") == "run":
                kind = entry.run.job_type
                # One W&B run per project, however often it is sent.
                assert kind != "overview" or entry.run.run_id == OVERVIEW_ID
            if entry.WhichOneof("record_type") == "history":
                for item in entry.history.item:
                    key = item.key or "/".join(item.nested_key)
                    value = json.loads(item.value_json)
                    parts = value.items() if isinstance(value, dict) else [("", value)]
                    logged |= {f"{key}/{part}".rstrip("/"): said for part, said in parts}
        yield kind, logged, file.parent


def media(folder, logged, key):
    return json.loads((folder / "files" / logged[f"{key}/path"]).read_text())


def test_an_overview_holds_leaderboard_plots_tables_and_the_page(store):
    records = store.all()
    page = write_report(store.root).path
    found = build_overview(build_leaderboard(records), page, [paper_table(records[1].id)])
    assert track_overview(found, TrackerConfig(mode="offline"), store.root) is None
    ((kind, logged, folder),) = offline_runs(store.root / "wandb_home")
    assert kind == "overview"

    leaderboard = media(folder, logged, "leaderboard/runs")
    assert len(leaderboard["data"]) == len(records)
    rows = [dict(zip(leaderboard["columns"], row, strict=True)) for row in leaderboard["data"]]
    by_run = {row["run"]: row for row in rows}
    for record in records:
        row = by_run[record.id]
        assert row["method"] == record.label
        assert row["score"] == pytest.approx(record.metric("average").value)
        assert row["boolq"] == pytest.approx(record.metric("boolq").value)
        flops = record.cost("flops", "forward 1x512").value
        assert row["flops of forward 1x512"] == pytest.approx(flops)

    points = media(folder, logged, "pareto/tiny on nine (0-shot)_table")
    assert len(points["data"]) == len(records)
    assert points["columns"][-2:] == ["flops of forward 1x512", "average"]

    table = media(folder, logged, "tables/camera_main")
    assert table["data"][0][4:9] == [61.5, 0.8, records[1].id, "60.9", 0.6]
    assert table["data"][1][-1] == "other metric"

    html = (folder / "files" / logged["report/page/path"]).read_text()
    assert records[0].id in html


@pytest.mark.broad
def test_a_project_is_rebuilt_from_its_records(store, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main.main(["track", "--results-dir", str(store.root)]) == 0
    printed = capsys.readouterr()
    said = printed.out.split("\n")
    assert "nothing has left this machine; to upload: wandb sync" in printed.err
    # Offline nothing is sent, and the words do not say so.
    assert [f"kept {record.id}" in said for record in store.all()] == [True] * 6
    assert "kept overview of slimbench" in said
    kinds = sorted(kind for kind, _, _ in offline_runs(store.root / "wandb_home"))
    assert kinds == ["overview", *["run"] * 6]


def test_records_of_two_projects_get_two_overviews(store):
    records = store.all()
    for at, record in enumerate(records):
        config = {**record.config, "tracker": {"project": f"p{at % 2}", "mode": "offline"}}
        records[at] = record.model_copy(update={"config": config})
    page = write_report(store.root).path
    sent = dict(sync_all(store, records[:2], page))
    assert [name for name in sent if name.startswith("overview")] == [
        "overview of p0", "overview of p1",
    ]  # fmt: skip
    assert set(sent.values()) == {None}
