"""A W&B run that is open while the run it mirrors goes on, and never stops it."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.records import Store
from bench.records.record import EffectCheck, SizeAndWork
from bench.schema import TrackerConfig
from bench.tracking import tracker, upload
from bench.tracking.tracker import follow, track, track_model
from bench.tracking.upload import LiveRun, Opening, Upload, UploadTimeout
from bench.tracking.wandb_run import summary_columns
from bench.ui import Progress
from tests.records.test_store import make
from tests.tracking.offline import entries

# Each starts W&B's client and its service, which answer too late where two tests do so at once.
pytestmark = pytest.mark.slow
LIVE = TrackerConfig(mode="offline", live=True, timeout=60)


@pytest.fixture
def store(tmp_path, monkeypatch):
    # After a test in which the server is away, this process contacts it no more.
    monkeypatch.setattr(tracker, "_unanswered_runs", [])
    return Store(tmp_path / "results")


def opened(store, record, config=LIVE):
    shown = LiveRun("tiny camera_p 0.4", "sweep-1", ["tiny"], {"seed": 3, "model.name": "tiny"})
    return follow(record.id, shown, store, config)


def kept(store):
    """What the one W&B run holds: its opening, history, summary and exit code."""
    (file,) = (store.root / "wandb_home").rglob("run-*.wandb")
    sent = entries(file)
    kinds = [entry.WhichOneof("record_type") for entry in sent]
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json)
         for item in entry.history.item}
        for entry in sent if entry.WhichOneof("record_type") == "history"
    ]  # fmt: skip
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for entry in sent
        if entry.WhichOneof("record_type") == "summary"
        for item in entry.summary.update
    }
    return sent[kinds.index("run")].run, history, summary, sent[-1].exit.exit_code


def test_phases_and_tasks_are_shown_before_the_record(store):
    record = make()
    live = opened(store, record)
    progress = Progress(quiet=True)
    progress.watcher = live
    with progress.phase("tiny on arc_easy", total=4):
        progress.step(4)
    progress.result("arc_easy", 0.5, 0.1)
    progress.result("english", 12.0, None)
    store.write(record, [], "")
    assert track(record, store, LIVE, live) is None
    run, history, summary, code = kept(store)
    assert (run.run_id, run.run_group, run.display_name) == (record.id, "sweep-1",
                                                             "tiny camera_p 0.4")  # fmt: skip
    assert any("progress/seconds" in row for row in history)
    at = next(i for i, row in enumerate(history) if row.get("arc_easy") == 0.5)
    assert history[at]["arc_easy_stderr"] == 0.1
    assert next(row for row in history[at + 1 :] if "english" in row)["english"] == 12.0
    assert (summary["phase"], summary["method"], code) == ("done", "dense", 0)


def killed(live):
    """What the client sees when the run's process is gone."""
    live._process.stdin.close()
    live._process.wait()


@pytest.mark.parametrize("end", [Upload.abandon, killed])
def test_a_run_without_a_record_has_failed(store, end):
    live = opened(store, make())
    live.phase("loading the model", None, 0.1)
    end(live)
    _, _, summary, code = kept(store)
    assert (summary["phase"], code) == ("loading the model", 1)


def test_a_client_that_hangs_costs_the_run_no_time(tmp_path, monkeypatch):
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/sh\nsleep 60\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(upload, "SECONDS_BETWEEN_EVENTS", 0.0)
    monkeypatch.setattr(sys, "executable", str(deaf))
    live = Upload(Opening("0" * 12, str(tmp_path), {}), timeout=0.2)
    began = time.monotonic()
    for number in range(5000):  # more than a pipe holds
        live.phase(f"phase {number}", 0.5, 1.0)
        live.result("task", 0.5, None)
    with pytest.raises(UploadTimeout, match="no answer"):
        live.send()
    assert time.monotonic() - began < 10
    assert live._process.poll() is not None


def test_a_client_that_died_costs_nothing_but_the_message(tmp_path, monkeypatch):
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho no such client >&2\nexit 3\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    live = Upload(Opening("0" * 12, str(tmp_path), {}), timeout=10)
    live._process.wait()
    live.phase("scoring", None, 1.0)
    with pytest.raises(upload.UploadFailed, match="no such client"):
        live.send()


@pytest.mark.parametrize(
    "config", [TrackerConfig(kind="none"), TrackerConfig(mode="offline"),
               TrackerConfig(mode="online", live=False)],
)  # fmt: skip
def test_nothing_is_opened_that_nobody_watches(store, config):
    assert opened(store, make(), config) is None
    assert not (store.root / "wandb_home").exists()


def test_the_documented_sweep_composes_as_its_agent_starts_it():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    sweep = yaml.safe_load(re.search(r"```yaml\n(# wandb sweep.*?)```", page, re.DOTALL)[1])
    chosen = {"method": {"value": "camera_p"}, "ratio": {"value": 0.25}}
    assert set(chosen) == set(sweep["parameters"])
    words = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = create_sweep_command(sweep["command"])
    place = command.index("${args_no_hyphens}")
    assert command[:2] == [sweep["program"], "run"]
    config = compose_run_config([*command[2:place], *words, *command[place + 1 :]])
    assert config.method["camera_p"].ratio == 0.25


def test_an_exported_model_is_an_artifact_of_its_run(store, tmp_path):
    record = make(ratio=0.4)
    model = tmp_path / "export"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=f"bench export {record.id}"):
        track_model(record, model, store, LIVE)
    (model / "README.md").write_text(f"- run `{record.id}`")
    assert track_model(record, model, store, LIVE) is None
    (file,) = (store.root / "wandb_home").rglob("run-*.wandb")
    sent = entries(file)
    assert {entry.run.run_id for entry in sent if entry.WhichOneof("record_type") == "run"} == {
        record.id
    }
    (request,) = [e.request.log_artifact for e in sent if e.request.HasField("log_artifact")] or [
        e.artifact for e in sent if e.WhichOneof("record_type") == "artifact"
    ]
    made = getattr(request, "artifact", request)
    assert (made.name, made.type) == (f"model-{record.id}", "model")
    assert json.loads(made.metadata)["made_from"]["name"] == record.model.name


def checked(record, before=100, after=40):
    """A record with a method whose effect was counted."""
    counts = [SizeAndWork(parameters=n, packed=0, bytes=4 * n, flops=2.0 * n)
              for n in (before, after)]  # fmt: skip
    check = EffectCheck(found="removed", before=counts[0], after=counts[1])
    method = record.methods[0].model_copy(update={"check": check})
    return record.model_copy(update={"methods": (method,)})


def test_savings_are_what_was_counted_over_all_methods():
    steps = (checked(make(ratio=0.4), 100, 80), checked(make(ratio=0.4), 80, 40))
    record = make().model_copy(update={"methods": tuple(step.methods[0] for step in steps)})
    columns = summary_columns(record)
    assert (columns["flops_saving"], columns["bytes_saving"]) == (0.6, 0.6)
    assert "flops_saving" not in summary_columns(make())


def test_a_run_is_followed_from_its_first_phase_to_its_record(store):
    words = ["model=micro_resnet", "method=dense", "benchmark=images", "benchmark.limit=8",
             "tracker=wandb", "tracker.mode=offline", "tracker.live=true",
             f"results_dir={store.root}"]  # fmt: skip
    assert main(["run", *words]) == 0
    (record,) = store.all()
    run, history, summary, code = kept(store)
    assert (run.run_id, summary["phase"], code) == (record.id, "done", 0)
    (metric,) = (metric for metric in record.metrics if metric.headline)
    live = [row for row in history if "progress/seconds" in row or metric.task in row]
    assert "progress/seconds" in live[0]
    assert any(row.get(metric.task) == metric.value for row in live)
