"""One command from config to record, through the real harness on the trained model."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import bench as library
from bench.data.synthetic.world import question_sets
from bench.models import embedded
from bench.records import Store

HELP = [sys.executable, "-P", "-m", "bench", "--help"]


def test_a_run_leaves_one_whole_record_and_is_not_repeated(bench):
    code, out, _ = bench("run", "method=camera_p", "ratio=0.4")
    assert code == 0
    assert "camera_p" in out
    (record,) = Store(bench.results).all()
    assert record.methods[0].effect == "removed"
    assert {m.task for m in record.metrics} >= {*question_sets.TASKS, "average", "english"}
    assert record.cost("parameters").value < record.model.parameters
    assert record.provenance["seed"] == 1234
    assert len(record.provenance["calibration"]) == 64
    folder = bench.results / "runs" / record.id
    assert {p.name for p in folder.iterdir()} == {"record.json", "samples.parquet", "config.yaml"}
    samples = pd.read_parquet(folder / "samples.parquet")
    assert (samples.groupby("task").size().loc[list(question_sets.TASKS)] == 6).all()

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    code, out, _ = bench("run", "method=camera_p", "ratio=0.4")
    assert code == 0
    assert "already recorded" in out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.broad
def test_the_same_run_twice_gives_the_same_numbers(bench):
    arguments = ("run", "method=camera_p", "ratio=0.6")
    bench(*arguments)
    (first,) = Store(bench.results).all()
    bench(*arguments, "force=true")
    (second,) = Store(bench.results).all()
    assert first.id == second.id
    assert first.started != second.started
    assert first.metrics == second.metrics
    counted = [c for c in first.costs if c.how == "counted"]
    assert counted == [c for c in second.costs if c.how == "counted"]


@pytest.mark.broad
def test_a_sweep_shares_group_and_dense_record(bench):
    code, out, _ = bench(
        "run", "-m", "method=dense,camera_p,[random_experts,camera_p]", "ratio=0.2,0.5",
        "benchmark.tasks=[arc_easy,boolq]", "~benchmark.perplexity",
    )  # fmt: skip
    assert code == 0
    records = Store(bench.results).all()
    labels = sorted(record.label for record in records)
    assert labels == [
        "camera_p 0.2", "camera_p 0.5", "dense",
        "random_experts 0.2 + camera_p 0.2", "random_experts 0.5 + camera_p 0.5",
    ]  # fmt: skip
    assert len({record.sweep for record in records}) == 1
    assert out.count("dense") == 1
    assert len({record.model.fingerprint for record in records}) == 1


@pytest.mark.broad
def test_a_dense_run_after_pruned_ones_is_untouched(bench):
    fast = ("benchmark.tasks=[arc_easy]", "~benchmark.perplexity")
    bench("run", *fast)
    (dense,) = Store(bench.results).all()
    bench("run", "-m", "method=camera_p,dense", "ratio=0.6", "seed=7", *fast)
    again = [r for r in Store(bench.results).all() if not r.methods]
    assert [r.metrics for r in again] == [dense.metrics, dense.metrics]


@pytest.mark.broad
def test_one_failing_job_does_not_stop_the_others(bench, monkeypatch):
    from methods.camera.pruning import CameraP

    apply = CameraP.apply

    def failing(self, model, context):
        if self.ratio == 0.5:
            raise RuntimeError("the disk caught fire")
        return apply(self, model, context)

    monkeypatch.setattr(CameraP, "apply", failing)
    code, _, err = bench(
        "run", "-m", "method=camera_p", "ratio=0.4,0.5,0.6",
        "benchmark.tasks=[arc_easy]", "~benchmark.perplexity",
    )  # fmt: skip
    assert code == 1
    assert "the disk caught fire" in err
    assert "Traceback" not in err
    assert sorted(r.label for r in Store(bench.results).all()) == ["camera_p 0.4", "camera_p 0.6"]


def test_local_files_serve_a_real_task(bench, tmp_path):
    questions = question_sets.documents("arc_easy", "test")[:5]
    path = tmp_path / "questions.parquet"
    pd.DataFrame(questions).to_parquet(path)
    code, _, err = bench(
        "run", "benchmark=nine_tasks", "benchmark.tasks=[arc_easy]",
        f"benchmark.data.arc_easy={path}", "tracker=none", "offline=true",
    )  # fmt: skip
    assert (code, err) == (0, "")
    (record,) = Store(bench.results).all()
    assert record.metric("arc_easy").n == 5


def test_records_can_be_read_again(bench):
    bench("run", "benchmark.tasks=[arc_easy]", "~benchmark.perplexity")
    (record,) = Store(bench.results).all()
    code, out, _ = bench("ls", "runs", "--json")
    assert code == 0
    assert [row["run"] for row in json.loads(out)] == [record.id]
    code, out, _ = bench("show", record.id[:5])
    assert code == 0
    assert "arc_easy" in out
    code, out, _ = bench("show", record.id, "--json")
    assert json.loads(out)["id"] == record.id
    code, out, _ = bench("show", record.id, "--command")
    assert out.startswith("bench run 'benchmark.tasks=[arc_easy]'")
    frame = library.records.load(bench.results)
    assert set(frame.run) == {record.id}


def test_python_and_command_line_do_the_same(bench, tmp_path):
    arguments = [
        "benchmark.tasks=[boolq]", "~benchmark.perplexity", "benchmark.limit=6",
        "costs.length=32", "tracker=none",
    ]  # fmt: skip
    (record,) = library.run([*arguments, f"results_dir={tmp_path / 'python'}"])
    bench("run", *arguments)
    (other,) = Store(bench.results).all()
    assert record.id == other.id
    assert record.metrics == other.metrics


@pytest.mark.parametrize("what", ["models", "methods", "benchmarks"])
def test_what_there_is_can_be_listed(bench, what):
    code, out, _ = bench("ls", what, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows
    assert all(row["about"] for row in rows)


@pytest.mark.slow
def test_doctor_says_what_works_offline(bench):
    code, out, _ = bench("doctor", "--json")
    found = {row["what"]: row for row in json.loads(out)}
    assert code == 0
    assert found["model micro_moe"]["state"] == "ok"
    assert found["benchmark nine_tasks_micro"]["state"] == "ok"
    assert found["model mixtral_8x7b"]["state"] == "missing"


@pytest.mark.broad
def test_prefetch_takes_the_name_of_a_table(bench):
    code, out, _ = bench("prefetch", "camera_main", "scale=micro", "variants=[20%]")
    assert code == 0
    assert "micro_moe" in out
    code, _, err = bench("prefetch", "camera_min")
    assert code == 2
    assert "did you mean 'camera_main'?" in err


def test_prefetch_names_what_a_micro_run_uses(bench):
    code, out, _ = bench("prefetch", "method=camera_p")
    assert code == 0
    assert "micro_moe" in out


def test_help_starts_at_once():
    took = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(HELP, check=True, capture_output=True)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.4


def test_the_composed_config_can_be_seen_without_running(bench):
    code, out, _ = bench("run", "--cfg", "job", "method=camera_p", "method.camera_p.ratio=0.3")
    assert code == 0
    assert "ratio: 0.3" in out
    assert not (bench.results / "runs").exists()


@pytest.mark.broad
def test_a_sweep_goes_over_a_folder_and_a_named_model(bench, tmp_path, monkeypatch):
    shipped = Path(next(iter(embedded.__path__))) / "micro_moe"
    shutil.copytree(shipped, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    swept = ["-m", "model=./mine,micro_moe", "benchmark.tasks=[rte]", "benchmark.limit=2"]
    code, _, said = bench("run", *swept)
    assert code == 0, said
    records = {record.model.name: record for record in Store(bench.results).all()}
    assert records.keys() == {"mine", "micro_moe"}
    (mine, shipped) = (records[name] for name in ("mine", "micro_moe"))
    assert mine.model.fingerprint == shipped.model.fingerprint
    assert mine.metrics == shipped.metrics
