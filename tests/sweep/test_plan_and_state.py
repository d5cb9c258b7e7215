"""A sweep's plan and its jobs' notes: what is shown, what is gone on with, what is never lost."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.records import Store
from bench.sweep import Asked, Result, again, begin, jobs, keep, ran, unfinished
from bench.sweep.inputs import Inputs
from bench.sweep.plan import find, read
from bench.sweep.state import summary, table
from tests.records.test_store import make

ASKED = Asked("bench run ratio=0.2", "sweep")
IDENTIFIER = "a" * 12


@pytest.fixture
def plan(tmp_path):
    begun = begin(tmp_path, ["-m", "ratio=0.2,0.4,0.6"], None)
    return begun.with_jobs([[f"ratio={r}", "seed=1"] for r in (0.2, 0.4, 0.6)], complete=True)


def record(plan):
    stored = make(IDENTIFIER)
    Store(plan.results_dir).write(stored, [], "")
    return Result(stored, reused=False)


def fails(error):
    def perform():
        raise error

    return perform


def states(plan):
    return [job.state for job in jobs(plan)]


def test_each_way_a_job_can_go(plan):
    assert states(plan) == ["waiting"] * 3
    keep(plan.folder, 0, ASKED, lambda: record(plan))
    keep(plan.folder, 1, ASKED, fails(RuntimeError("the disk caught fire\nbadly")))
    with pytest.raises(KeyboardInterrupt):
        keep(plan.folder, 2, ASKED, fails(KeyboardInterrupt()))
    assert states(plan) == ["done", "failed", "waiting"]
    done, failed, interrupted = jobs(plan)
    assert done.run == IDENTIFIER
    assert failed.reason == "RuntimeError: the disk caught fire"
    assert "Traceback" in Path(failed.log).read_text()
    assert interrupted.reason == "interrupted"
    assert [job.number for job in unfinished(plan)] == [1, 2]
    assert summary(plan) | {"sweep": ""} == {
        "sweep": "", "waiting": 1, "running": 0, "done": 1, "failed": 1,
        "asked": "-m ratio=0.2,0.4,0.6",
    }  # fmt: skip
    assert [row["asks"] for row in table(plan)] == ["ratio=0.2", "ratio=0.4", "ratio=0.6"]
    came = list(ran(plan))
    assert came[0].record.id == IDENTIFIER
    assert "the disk caught fire" in came[1]
    assert str(failed.log) in came[1]


def test_wrong_input_of_a_job_needs_no_log(plan):
    keep(plan.folder, 0, ASKED, fails(UserError("ratio=2: too much")))
    job = jobs(plan)[0]
    assert (job.state, job.reason, job.log) == ("failed", "ratio=2: too much", None)


def sleep_in(folder):
    keep(folder, 0, ASKED, lambda: time.sleep(600))


def test_a_process_that_was_killed_is_told_from_one_that_works(plan):
    child = multiprocessing.get_context("fork").Process(target=sleep_in, args=(plan.folder,))
    child.start()
    until = time.monotonic() + 30
    while states(plan)[0] != "running" and time.monotonic() < until:
        time.sleep(0.02)
    assert states(plan)[0] == "running"
    assert 0 not in [job.number for job in unfinished(plan)]
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    job = jobs(plan)[0]
    assert job.state == "failed"
    assert " died (killed, out of memory, or preempted)" in job.reason
    assert 0 in [job.number for job in unfinished(plan)]


def test_a_record_that_is_gone_is_missing_again(plan):
    keep(plan.folder, 0, ASKED, lambda: record(plan))
    (Store(plan.results_dir).folder(IDENTIFIER) / "record.json").unlink()
    assert states(plan)[0] == "waiting"
    assert IDENTIFIER in jobs(plan)[0].reason


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"number": 0}', "\x00\x01"])
def test_a_damaged_note_counts_as_none(plan, content):
    keep(plan.folder, 0, ASKED, lambda: record(plan))
    (plan.folder / "jobs" / "00000.json").write_text(content)
    assert states(plan)[0] == "waiting"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_damaged_or_newer_plan_is_left_out(plan, content):
    (plan.folder / "plan.json").write_text(content)
    assert read(plan.folder) is None
    with pytest.raises(UserError, match="unknown sweep 'latest'"):
        find(plan.results_dir, "latest")


def test_a_plan_is_read_as_it_was_written_and_jobs_are_added_once(plan):
    assert read(plan.folder) == plan
    grown = plan.with_jobs([["ratio=0.2", "seed=1"], ["ratio=0.9"]], complete=False)
    assert len(grown.jobs) == 4
    assert grown.number(["ratio=0.9"]) == 3
    assert grown.number(["ratio=7"]) is None


def test_a_sweep_is_found_by_the_beginning_of_its_name(plan):
    assert find(plan.results_dir, plan.name[:10]) == plan
    assert find(plan.results_dir, "latest") == plan
    with pytest.raises(UserError, match="did you mean"):
        find(plan.results_dir, "x" + plan.name)
    begin(plan.results_dir, [], None)
    with pytest.raises(UserError, match="ambiguous"):
        find(plan.results_dir, plan.name[:6])


def test_the_same_sweep_goes_on_only_while_its_inputs_stand(tmp_path, monkeypatch):
    data = tmp_path / "questions.parquet"
    data.write_text("1")
    results = tmp_path / "results"
    plan = begin(results, ["-m"], Inputs.of([data], ["methods"]))
    assert again(results, ["-m"]) == plan
    assert again(results, ["-m", "seed=2"]) is None
    data.write_text("22")
    assert again(results, ["-m"]) is None
    plan = begin(results, ["-m"], Inputs.of([data], ["methods"]))
    assert again(results, ["-m"]) == plan
    monkeypatch.chdir(tmp_path)
    assert again(results, ["-m"]) is None
    assert again(tmp_path / "nowhere", ["-m"]) is None


def test_what_a_hub_may_change_is_always_asked_again(tmp_path):
    begin(tmp_path, ["-m"], None)
    assert again(tmp_path, ["-m"]) is None


def test_notes_hold_no_secret(plan, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-0123456789")
    error = RuntimeError("key planted-secret-0123456789 was refused")
    keep(plan.folder, 0, Asked("bench run x=planted-secret-0123456789"), fails(error))
    texts = [path.read_text() for path in (plan.folder / "jobs").iterdir()]
    assert any("[hidden] was refused" in text for text in texts)
    assert not any("planted-secret" in text for text in texts)
    assert json.loads((plan.folder / "jobs" / "00000.json").read_text())["state"] == "failed"
