"""A sweep's plan and its jobs' notes: what is shown, what is gone on with, what is never lost."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bench.errors import Stopped, UserError
from bench.records import Store
from bench.records.files import write_bytes
from bench.sweeps import (
    RunRequest,
    RunResult,
    create_plan,
    existing_sweep,
    job_results,
    perform_job,
    sweep_jobs,
    unfinished_jobs,
)
from bench.sweeps.plan import SweepFingerprint, find_sweep, read_plan
from bench.sweeps.status import job_rows, left_by_others, sweep_summary
from tests.records.test_store import make

ASKED = RunRequest("bench run ratio=0.2", "sweep")
IDENTIFIER = "a" * 12


@pytest.fixture
def plan(tmp_path):
    begun = create_plan(tmp_path, ["-m", "ratio=0.2,0.4,0.6"], None)
    return begun.with_jobs([[f"ratio={r}", "seed=1"] for r in (0.2, 0.4, 0.6)], complete=True)


def record(plan):
    stored = make(IDENTIFIER)
    Store(plan.results_dir).write(stored, [], "")
    return RunResult(stored, reused=False)


def fails(error):
    def perform():
        raise error

    return perform


def states(plan):
    return [job.state for job in sweep_jobs(plan)]


def test_each_way_a_job_can_go(plan):
    assert states(plan) == ["waiting"] * 3
    perform_job(plan.folder, 0, ASKED, lambda: record(plan))
    perform_job(plan.folder, 1, ASKED, fails(RuntimeError("the disk caught fire\nbadly")))
    with pytest.raises(KeyboardInterrupt):
        perform_job(plan.folder, 2, ASKED, fails(KeyboardInterrupt()))
    assert states(plan) == ["done", "failed", "waiting"]
    done, failed, interrupted = sweep_jobs(plan)
    assert done.run == IDENTIFIER
    assert failed.reason == "RuntimeError: the disk caught fire"
    assert "Traceback" in Path(failed.log).read_text()
    assert interrupted.reason == "interrupted"
    assert [job.number for job in unfinished_jobs(plan)] == [1, 2]
    assert sweep_summary(plan) | {"sweep": ""} == {
        "sweep": "", "waiting": 1, "running": 0, "done": 1, "failed": 1,
        "arguments": "-m ratio=0.2,0.4,0.6",
    }  # fmt: skip
    assert [row["overrides"] for row in job_rows(plan)] == ["ratio=0.2", "ratio=0.4", "ratio=0.6"]
    came = list(job_results(plan))
    assert came[0].record.id == IDENTIFIER
    assert "the disk caught fire" in came[1]
    assert str(failed.log) in came[1]
    assert came[2].endswith(": interrupted")


def test_wrong_input_of_a_job_needs_no_log(plan):
    perform_job(plan.folder, 0, ASKED, fails(UserError("ratio=2: too much")))
    job = sweep_jobs(plan)[0]
    assert (job.state, job.reason, job.log) == ("failed", "ratio=2: too much", None)


def sleep_in(folder):
    perform_job(folder, 0, ASKED, lambda: time.sleep(600))


def test_a_process_that_was_killed_is_told_from_one_that_works(plan):
    child = multiprocessing.get_context("fork").Process(target=sleep_in, args=(plan.folder,))
    child.start()
    until = time.monotonic() + 30
    while states(plan)[0] != "running" and time.monotonic() < until:
        time.sleep(0.02)
    assert states(plan)[0] == "running"
    assert 0 not in [job.number for job in unfinished_jobs(plan)]
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    job = sweep_jobs(plan)[0]
    assert job.state == "failed"
    assert " died (killed, out of memory, or preempted)" in job.reason
    assert 0 in [job.number for job in unfinished_jobs(plan)]


def end_in(plan, number, seconds):
    def work():
        time.sleep(seconds)
        return record(plan)

    perform_job(plan.folder, number, ASKED, work)


def test_jobs_of_other_processes_are_waited_for_and_those_they_leave_are_returned(plan):
    assert left_by_others(plan) == []
    forked = multiprocessing.get_context("fork").Process
    ends, dies = (forked(target=end_in, args=(plan, *given)) for given in ((0, 0.5), (1, 600)))
    ends.start()
    dies.start()
    until = time.monotonic() + 30
    while states(plan)[:2] != ["running"] * 2 and time.monotonic() < until:
        time.sleep(0.02)
    threading.Timer(0.2, dies.kill).start()
    (left,) = left_by_others(plan)
    assert (left.number, left.lost) == (1, True)
    assert states(plan) == ["done", "failed", "waiting"]
    ends.join()
    dies.join()


def test_a_record_that_is_gone_is_missing_again(plan):
    perform_job(plan.folder, 0, ASKED, lambda: record(plan))
    (Store(plan.results_dir).folder(IDENTIFIER) / "record.json").unlink()
    assert states(plan)[0] == "waiting"
    assert IDENTIFIER in sweep_jobs(plan)[0].reason
    # Not left out of the sweep's results, which would look whole without it.
    gone, *never = job_results(plan)
    assert gone.endswith(f"its record {IDENTIFIER} no longer exists")
    assert all(text.endswith("was not run; run the same command to resume") for text in never)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"number": 0}', "\x00\x01"])
def test_a_damaged_note_counts_as_none(plan, content):
    perform_job(plan.folder, 0, ASKED, lambda: record(plan))
    (plan.folder / "jobs" / "00000.json").write_text(content)
    assert states(plan)[0] == "waiting"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_damaged_or_newer_plan_is_left_out(plan, content):
    (plan.folder / "plan.json").write_text(content)
    assert read_plan(plan.folder) is None
    with pytest.raises(UserError, match="unknown sweep 'latest'"):
        find_sweep(plan.results_dir, "latest")


def test_a_plan_is_read_as_it_was_written_and_jobs_are_added_once(plan):
    assert read_plan(plan.folder) == plan
    grown = plan.with_jobs([["ratio=0.2", "seed=1"], ["ratio=0.9"]], complete=False)
    assert len(grown.jobs) == 4
    assert grown.number(["ratio=0.9"]) == 3
    assert grown.number(["ratio=7"]) is None


def test_a_sweep_is_found_by_the_beginning_of_its_name(plan):
    assert find_sweep(plan.results_dir, plan.name[:10]) == plan
    assert find_sweep(plan.results_dir, "latest") == plan
    with pytest.raises(UserError, match="did you mean"):
        find_sweep(plan.results_dir, "x" + plan.name)
    with pytest.raises(UserError, match="an unset shell variable"):
        find_sweep(plan.results_dir, "")
    create_plan(plan.results_dir, [], None)
    with pytest.raises(UserError, match="ambiguous"):
        find_sweep(plan.results_dir, plan.name[:6])


def test_the_same_sweep_goes_on_only_while_its_inputs_stand(tmp_path, monkeypatch):
    data = tmp_path / "questions.parquet"
    data.write_text("1")
    results = tmp_path / "results"
    plan = create_plan(results, ["-m"], SweepFingerprint.record_now([data], ["methods"]))
    assert existing_sweep(results, ["-m"]) == plan
    assert existing_sweep(results, ["-m", "seed=2"]) is None
    data.write_text("22")
    assert existing_sweep(results, ["-m"]) is None
    plan = create_plan(results, ["-m"], SweepFingerprint.record_now([data], ["methods"]))
    assert existing_sweep(results, ["-m"]) == plan
    monkeypatch.chdir(tmp_path)
    assert existing_sweep(results, ["-m"]) is None
    assert existing_sweep(tmp_path / "nowhere", ["-m"]) is None


def test_what_a_hub_may_change_is_always_asked_again(tmp_path):
    create_plan(tmp_path, ["-m"], None)
    assert existing_sweep(tmp_path, ["-m"]) is None


def test_notes_hold_no_secret(plan, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-0123456789")
    error = RuntimeError("key planted-secret-0123456789 was refused")
    perform_job(plan.folder, 0, RunRequest("bench run x=planted-secret-0123456789"), fails(error))
    texts = [path.read_text() for path in (plan.folder / "jobs").iterdir()]
    assert any("[hidden] was refused" in text for text in texts)
    assert not any("planted-secret" in text for text in texts)
    assert json.loads((plan.folder / "jobs" / "00000.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("writes_before", [0, 1])
def test_a_full_disk_stops_the_sweep_and_not_one_job(plan, monkeypatch, writes_before):
    """Whether the first status of a job meets it or the last."""
    left = [writes_before]

    def write(path, content):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        write_bytes(path, content)

    monkeypatch.setattr("bench.sweeps.job.write_bytes", write)
    with pytest.raises(Stopped, match=r"No space left on device.*same command"):
        perform_job(plan.folder, 0, ASKED, lambda: record(plan))
