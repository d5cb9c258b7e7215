"""Real sweeps through joblib, submitit and Ray: the records of one process, lost workers or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.cli.main import main
from bench.records import Store

HERE = Path(__file__).parent
TINY = [
    "benchmark.tasks=[arc_easy]", "~benchmark.perplexity", "benchmark.limit=2", "costs.length=32",
    "calibration.rows=2", "calibration.length=128", "threads=1", "tracker=none",
]  # fmt: skip
CRASHING = ["hydra.searchpath=[pkg://crashing_method.conf]", "packages=[methods,crashing_method]"]
ONE_AT_A_TIME = {
    "joblib": ["hydra.launcher.jobs=1"],
    "slurm_local": ["hydra.launcher.parallel=1"],
    "ray": ["hydra.launcher.num_cpus=1"],
}


def bench(*arguments, **environment):
    """Call the command line in a process of its own, as a user does."""
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])}
    asked = [sys.executable, "-P", "-m", "bench", *map(str, arguments)]
    return subprocess.run(
        asked, env={**known, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Let this process and its children import this working tree and `crashing_method`."""
    root = str(HERE.parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(HERE))


def numbers(results):
    """Everything in the records that must not depend on where they were made."""
    return {
        record.id: (
            record.label,
            record.metrics,
            [cost for cost in record.costs if cost.how == "counted"],
            [(method.name, method.config, _untimed(method.report)) for method in record.methods],
        )
        for record in Store(results).all()
    }


def _untimed(report):
    """A method's report without how long its analysis took."""
    return {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "harm", "preempted_by"),
    [
        ("ray", "SIGKILL", "USR2"),
        ("joblib", "SIGKILL", "USR2"),
        ("slurm_local", "SIGUSR2", "USR2"),
        ("slurm_local", "SIGUSR1", "USR1"),  # queued again by submitit, as the cluster is set up
        ("slurm_local", "SIGUSR1", "USR2"),  # ends the worker, which is lost then
    ],
)
def test_a_lost_or_preempted_worker_costs_nothing(tmp_path, launcher, harm, preempted_by):
    sweep = [
        *TINY, *CRASHING, "-m", "method=crashing_method", f"method.crashing_method.signal={harm}",
        f"method.crashing_method.marker={tmp_path / 'marker'}", "seed=1,2",
    ]  # fmt: skip
    there, here = tmp_path / "there", tmp_path / "here"
    done = bench(
        "run", *sweep, f"results_dir={there}", f"hydra/launcher={launcher}",
        *ONE_AT_A_TIME[launcher], SUBMITIT_PREEMPT_SIGNAL=preempted_by,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()
    logs = [log.read_text() for log in there.rglob("*_log.out")]
    queued_again = any("this job is preempted" in log for log in logs)
    assert queued_again == (launcher == "slurm_local" and harm == f"SIG{preempted_by}")
    assert main(["run", *sweep, f"results_dir={here}"]) == 0
    assert len(numbers(here)) == 2
    assert numbers(there) == numbers(here)


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_takes_its_jobs_along_and_goes_on_later(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    sweep = [*TINY, "-m", "method=random_experts", "seed=1,2,3"]
    asked = [
        "run", *sweep, f"results_dir={there}", "hydra/launcher=slurm_local",
        *ONE_AT_A_TIME["slurm_local"],
    ]  # fmt: skip
    command = [sys.executable, "-P", "-m", "bench", *asked]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        until = time.monotonic() + 300
        while not list(there.glob("runs/*/record.json")):
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        started.send_signal(signal.SIGUSR1)
        said = started.communicate(timeout=120)[1]
    assert started.returncode == 75, said
    assert "run the same command to resume" in said
    first = {path: path.stat().st_mtime_ns for path in there.glob("runs/*/record.json")}
    assert len(first) < 3
    done = bench(*asked)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert main(["run", *sweep, f"results_dir={here}"]) == 0
    assert len(numbers(here)) == 3
    assert numbers(there) == numbers(here)


@pytest.mark.slow
def test_a_worker_that_always_dies_fails_alone(tmp_path, capsys):
    results = tmp_path / "results"
    sweep = [
        *TINY, *CRASHING, "-m", "method=crashing_method,dense,random_experts",
        f"results_dir={results}",
        "hydra/launcher=joblib", "hydra.launcher.jobs=1",
    ]  # fmt: skip
    done = bench("run", *sweep)
    assert done.returncode == 1, done.stderr
    assert "died (killed" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(label for label, *_ in numbers(results).values()) == [
        "dense", "random_experts 0.2",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["status", "latest", "--json", "--results-dir", str(results)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["failed", "done", "done"]
    before = {path: path.stat().st_mtime_ns for path in results.glob("runs/*/record.json")}
    # The stored plan cannot allow the method's package to run.
    resumed = bench("resume", "latest", *CRASHING, "--results-dir", results)
    assert resumed.returncode == 1, resumed.stderr
    assert {p: p.stat().st_mtime_ns for p in results.glob("runs/*/record.json")} == before


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ray", "slurm_local", "joblib"])
def test_twelve_runs_anywhere_are_those_of_one_process(tmp_path, launcher):
    sweep = [
        "-m", "model=micro_moe", "method=dense,camera_p,random_experts,expert_frequency",
        "ratio=0.2,0.4,0.6", "benchmark=camera_micro", *TINY[2:],
    ]  # fmt: skip
    there, here = tmp_path / "there", tmp_path / "here"
    done = bench("run", *sweep, f"results_dir={there}", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert main(["run", *sweep, f"results_dir={here}"]) == 0
    # The dense model's three jobs share one record.
    assert len(numbers(here)) == 10
    assert numbers(there) == numbers(here)
