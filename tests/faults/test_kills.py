"""kill -9 at every stage and at random moments, polite signals: the same command goes on."""

import os
import random
import signal
import time
from collections import Counter

import pytest

from bench.records import Store, atomic
from tests.faults.processes import counting, die_in, only, run, start, timeless, wait_for

RUN = ("method=camera_p", "ratio=0.4")
BATCH = 4 * 4  # four documents of four choices go through the network together
STAGES = (
    "loading the model",
    "counting costs",
    "applying camera_p",
    "micro_moe on arc_easy",
    "micro_moe on boolq",
    "micro_moe on english",
    "writing the record",
)


def die_at_rename(number):
    """Return what kills a process right after the `number`-th rename of a folder."""

    def arm():
        rename, seen = atomic.Path.rename, []

        def deadly(self, target):
            found = rename(self, target)
            seen.append(self)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        atomic.Path.rename = deadly

    return arm


def journals(results):
    return list((results / "unfinished").glob("*/answers.journal"))


def lines(results):
    return sum(path.read_bytes().count(b"\n") for path in journals(results))


def test_killed_at_every_stage_in_turn_it_ends_as_one_that_was_not(tmp_path, same):
    results = tmp_path / "results"
    for stage in STAGES:
        code, said = run(results, *RUN, before=die_in(stage))
        assert code == -signal.SIGKILL, said
        assert not Store(results).all()
    assert run(results, *RUN)[0] == 0
    same(results)


def test_killed_between_record_and_clean_up_it_is_done(tmp_path, same):
    results = tmp_path / "results"
    assert run(results, *RUN, before=die_at_rename(1))[0] == -signal.SIGKILL
    assert journals(results)
    code, said = run(results, *RUN)
    assert (code, "already recorded" in said) == (0, True)
    same(results)


def test_killed_while_a_record_is_replaced_there_is_always_one(tmp_path, same):
    results = tmp_path / "results"
    run(results, *RUN)
    before = only(results)
    assert run(results, *RUN, "force=true", before=die_at_rename(1))[0] == -signal.SIGKILL
    code, said = run(results, *RUN)
    assert (code, "already recorded" in said) == (0, True)
    assert only(results) == before
    assert run(results, *RUN, "force=true")[0] == 0
    assert only(results).started > before.started


def killed_at(results, moment, log):
    """Start the run, kill it after so many seconds unless it is done, return its exit code."""
    child = start(results, *RUN, before=counting(log))
    time.sleep(moment)
    child.kill()
    return child.wait()


def timed(tmp_path):
    began = time.monotonic()
    assert run(tmp_path / "timed" / "results", *RUN)[0] == 0
    return time.monotonic() - began


def scored_twice(log):
    counts = Counter(log.read_text().split())
    return sum(count - 1 for count in counts.values())


def test_killed_ten_times_over_no_sample_is_scored_twice(tmp_path, same):
    whole, draw, kills = timed(tmp_path), random.Random(8), 0
    results, log = tmp_path / "results", tmp_path / "scored"
    log.touch()
    for _ in range(10):
        kills += killed_at(results, draw.uniform(0.3, 0.6) * whole, log) == -signal.SIGKILL
    assert kills >= 2
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    assert scored_twice(log) <= kills * BATCH


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment_it_ends_as_one_that_was_not(tmp_path, same, number):
    whole = timed(tmp_path)
    results, log = tmp_path / "results", tmp_path / "scored"
    log.touch()
    killed_at(results, random.Random(number).uniform(0, 1) * whole, log)
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    assert scored_twice(log) <= BATCH


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_polite_signal_is_exit_code_75_and_nothing_is_scored_twice(tmp_path, same, number):
    results, log = tmp_path / "results", tmp_path / "scored"
    child = start(results, *RUN, before=counting(log, pause=0.05))
    wait_for(lambda: lines(results) > 3)
    child.kill(number)
    assert child.wait() == 75
    assert "the same command goes on" in child.text
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    assert scored_twice(log) == 0


def test_two_processes_at_one_run_score_it_once(tmp_path, same):
    results, log = tmp_path / "results", tmp_path / "scored"
    first = start(results, *RUN, before=counting(log, pause=0.02))
    wait_for(lambda: journals(results))
    second = start(results, *RUN, before=counting(log))
    assert (first.wait(), second.wait()) == (0, 0)
    assert "another process is at run" in second.text
    assert "already recorded" in second.text
    assert scored_twice(log) == 0
    same(results)


def test_the_one_who_waits_goes_on_when_the_other_is_killed(tmp_path, same):
    results, log = tmp_path / "results", tmp_path / "scored"
    first = start(results, *RUN, before=counting(log, pause=0.1))
    wait_for(lambda: lines(results) > 3)
    second = start(results, *RUN, before=counting(log))
    wait_for(lambda: "another process" in second.text)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0
    assert scored_twice(log) <= BATCH
    same(results)


def test_other_methods_meet_none_of_its_answers(tmp_path, undisturbed):
    """A method that has changed is another run: it scores every sample itself."""
    results, log = tmp_path / "results", tmp_path / "scored"
    child = start(results, "method=camera_p", "ratio=0.6", before=counting(log, pause=0.05))
    wait_for(lambda: lines(results) > 3)
    child.kill()
    child.wait()
    alone = tmp_path / "alone"
    assert run(results, *RUN, before=counting(alone))[0] == 0
    assert timeless(only(results)) == timeless(only(undisturbed))
    whole = tmp_path / "whole"
    assert run(tmp_path / "fresh" / "results", *RUN, before=counting(whole))[0] == 0
    assert sorted(alone.read_text().split()) == sorted(whole.read_text().split())
