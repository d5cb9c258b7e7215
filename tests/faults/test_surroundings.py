"""Machines with something wrong: no home, no locale, no writable disk, a wrong clock, odd paths."""

import io
import os
import shutil
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock

import bench.sweeps.plan as plans
from bench.cli.main import main
from bench.config.overrides import quoted_text
from bench.models import embedded
from bench.records import Store
from bench.sweeps.job import is_running, write_status
from bench.sweeps.plan import all_sweeps, create_plan, find_sweep
from bench.sweeps.status import unfinished_jobs
from tests.faults.killable_runs import SMALL
from tests.records.test_store import make
from tests.reporting.html.synthetic_records import fill

ROOT = Path(__file__).parents[2]
ODD = "a b, [c] = #'d'"
FOREIGN = "é漢 😀"
RUN = ("method=dense", "benchmark.tasks=[boolq]", "~benchmark.perplexity", "benchmark.limit=4")

# A day is lost while the run goes on: every look at the clock is earlier than the one before.
COMMANDS = """
import datetime, json, sys, time
from bench.cli.main import main
real, looks = time.time, [0]
def backwards():
    looks[0] += 1
    return real() - 86400 * looks[0] / 100
time.time = backwards
results, run = json.loads(sys.argv[1])
codes = [main(["run", *run])]
for command in (["ls", "runs"], ["report"], ["plot", "front", "--task", "boolq"], ["status"]):
    codes.append(main([*command, "--results-dir", results]))
print(codes)
"""


def small(*given):
    keys = {each.partition("=")[0] for each in given}
    kept = [each for each in SMALL if not each.startswith("benchmark.perplexity.")]
    return [*given, *(each for each in kept if each.partition("=")[0] not in keys)]


def command_in(folder, *more):
    import json

    results, model = folder / "results", folder / "model"
    shutil.copytree(Path(next(iter(embedded.__path__))) / "micro_moe", model)
    named = [f"{key}={quoted_text(str(path))}" for key, path in
             (("results_dir", results), ("model.path", model))]  # fmt: skip
    run = small(*RUN, *named, *more)
    return [sys.executable, "-P", "-c", COMMANDS, json.dumps([str(results), run])]


@pytest.mark.broad
def test_records_in_a_folder_with_foreign_letters(tmp_path, capsys):
    results = tmp_path / f"{ODD} {FOREIGN}"
    fill(results, 3, per_task=0)
    (run, *_) = Store(results).ids()
    for command in (["ls", "runs"], ["report"], ["show", run], ["plot", "front"], ["status"]):
        assert main([*command, "--results-dir", str(results)]) == 0, capsys.readouterr().err
    assert (results / "plots" / "front.svg").is_file()


def test_an_output_that_knows_no_accents_gets_the_rest(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    fill(tmp_path / "é", 1, per_task=0)
    assert main(["report", "--results-dir", str(tmp_path / "é")]) == 0
    assert sys.stdout.errors == "strict"
    sys.stdout.flush()
    assert b"report.html" in written.getvalue()


def test_bytes_that_the_locale_cannot_read_are_named_with_the_cure(tmp_path, capsys):
    hidden = os.fsencode("é").decode("ascii", "surrogateescape")
    for command in (["ls", "runs", "--results-dir", hidden], ["run", f"model.path={hidden}"]):
        assert main(command) == 2
        assert "set PYTHONUTF8=1" in capsys.readouterr().err


@pytest.mark.broad
def test_a_run_without_home_or_locale_on_odd_paths_and_a_clock_that_goes_back(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    poor = {
        **kept, "HOME": "/proc/nowhere", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = command_in(folder)
    done = subprocess.run(
        command, env={**poor, "PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, check=False
    )
    said = done.stdout.decode("utf-8", "replace") + done.stderr.decode("utf-8", "replace")
    assert "[0, 0, 0, 0, 0]" in said, said
    assert "Traceback" not in said
    assert len(Store(folder / "results").all()) == 1
    assert (folder / "results" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_in_a_read_only_container(tmp_path):
    folder = tmp_path / FOREIGN
    folder.mkdir()
    command = command_in(folder)
    script = textwrap.dedent(f"""
        mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro / || exit 77
        exec "$@"
    """)
    wrapped = ["unshare", "-m", "sh", "-c", script, "sh", *command]
    environment = {**os.environ, "HOME": "/root", "TMPDIR": "/", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        wrapped, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "Operation not permitted" in done.stderr:
        pytest.skip("needs the right to mount")
    assert "[0, 0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_lock_of_a_dead_host_holds_nothing(tmp_path):
    store = Store(tmp_path)
    lock = tmp_path / "locks" / f"{'a' * 12}.lock"
    lock.parent.mkdir()
    lock.write_text("12345 dead-host")
    waited = []
    with store.claim("a" * 12, on_wait=lambda: waited.append(True)):
        store.write(make(), [], "")
    assert not waited
    assert len(store.all()) == 1


def test_a_job_that_a_dead_host_left_running_is_run_again(tmp_path):
    plan = create_plan(tmp_path, ["-m", "seed=1,2"], None).with_jobs([["seed=1"]], complete=True)
    jobs = plan.folder / "jobs"
    jobs.mkdir(exist_ok=True)
    write_status(plan.folder, {
        "number": 0, "state": "running", "command": "bench run seed=1", "host": "dead-host",
        "pid": 1, "started": "2026-01-01",
    })  # fmt: skip
    (jobs / "00000.lock").write_text("1 dead-host")
    assert not is_running(plan.folder, 0)
    (job,) = unfinished_jobs(plan)
    assert job.reason is not None and "dead-host" in job.reason
    with FileLock(jobs / "00000.lock"):
        assert is_running(plan.folder, 0)


@pytest.mark.parametrize("step", [0, -60, -86400 * 400])
def test_sweeps_under_a_clock_that_stands_or_goes_back(tmp_path, monkeypatch, step):
    now = [datetime(2026, 3, 1, 2, 30, tzinfo=UTC)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            now.append(now[-1] + timedelta(seconds=step))
            return now[-1]

    monkeypatch.setattr(plans, "datetime", Clock)
    made = [create_plan(tmp_path, ["-m", f"seed={number}"], None) for number in range(5)]
    assert len({plan.name for plan in made}) == 5
    assert {plan.arguments for plan in all_sweeps(tmp_path)} == {plan.arguments for plan in made}
    assert find_sweep(tmp_path, made[3].name).arguments == made[3].arguments
