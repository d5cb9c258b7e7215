"""kill -9 at every stage and while scoring, polite signals: the same command goes on."""

import os
import random
import signal
import time

import pytest

from bench.records import Store, files
from tests.faults.killable_runs import (
    counting,
    die_in,
    journals,
    largest_batch,
    lines,
    only,
    run,
    scored_twice,
    start,
    timeless,
    wait_for,
)

RUN = ("method=camera_p", "ratio=0.4")
BRIEF = (
    "benchmark.tasks=[boolq]", "~benchmark.perplexity", "benchmark.limit=12",
    "benchmark.batch_size=4", "costs.length=32", "threads=1", "tracker=none",
)  # fmt: skip
"""A run of one task, for what is about many runs."""
STAGES = (
    "loading the model",
    "applying camera_p",
    "micro_moe on boolq",
    "micro_moe on english",
    "writing the record",
)


def die_at_rename(number):
    """Return what kills a process right after the `number`-th rename of a folder."""

    def arm():
        rename, seen = files.Path.rename, []

        def deadly(self, target):
            found = rename(self, target)
            seen.append(self)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        files.Path.rename = deadly

    return arm


def wait_for_more_than(count, results):
    wait_for(lambda: lines(results) > count)


@pytest.mark.broad
def test_killed_at_every_stage_in_turn_it_ends_as_one_that_was_not(tmp_path, same):
    results = tmp_path / "results"
    for stage in STAGES:
        code, said = run(results, *RUN, before=die_in(stage))
        assert code == -signal.SIGKILL, said
        assert not Store(results).all()
    assert run(results, *RUN)[0] == 0
    same(results)


@pytest.mark.broad
def test_killed_between_record_and_clean_up_it_is_done(tmp_path, same):
    results = tmp_path / "results"
    assert run(results, *RUN, before=die_at_rename(1))[0] == -signal.SIGKILL
    assert journals(results)
    code, said = run(results, *RUN)
    assert (code, "already recorded" in said) == (0, True)
    same(results)


@pytest.mark.broad
def test_killed_while_a_record_is_replaced_there_is_always_one(tmp_path, same):
    results = tmp_path / "results"
    run(results, *RUN)
    before = only(results)
    assert run(results, *RUN, "force=true", before=die_at_rename(1))[0] == -signal.SIGKILL
    code, said = run(results, *RUN)
    assert (code, "already recorded" in said) == (0, True)
    assert only(results) == before


@pytest.mark.broad
def test_killed_while_it_scores_again_and_again_no_sample_is_scored_twice(tmp_path, same):
    results, log, kills = tmp_path / "results", tmp_path / "scored", 4
    draw, before = random.Random(8), 1
    for _ in range(kills):
        child = start(results, *RUN, before=counting(log, pause=0.5))
        wait_for_more_than(before, results)
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        before = lines(results)
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    assert scored_twice(log) <= kills * largest_batch(log)


@pytest.mark.broad
def test_polite_signals_are_exit_code_75_and_nothing_is_scored_twice(tmp_path, same):
    results, log, before = tmp_path / "results", tmp_path / "scored", 1
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        child = start(results, *RUN, before=counting(log, pause=2.0))
        wait_for_more_than(before, results)
        child.kill(number)
        assert child.wait() == 75
        assert "run the same command to resume" in child.text
        before = lines(results)
    assert run(results, *RUN, before=counting(log))[0] == 0
    same(results)
    assert scored_twice(log) == 0


@pytest.mark.broad
def test_of_processes_at_one_run_one_works_and_the_others_wait(tmp_path, same):
    results, log = tmp_path / "results", tmp_path / "scored"
    first = start(results, *RUN, before=counting(log, pause=2.0))
    wait_for(lambda: lines(results) > 2)
    second = start(results, *RUN, before=counting(log, pause=0.05))
    wait_for(lambda: second.says("another process is executing run"))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    third = start(results, *RUN, before=counting(log))
    assert (second.wait(), third.wait()) == (0, 0)
    assert "already recorded" not in second.text
    assert "already recorded" in third.text
    assert scored_twice(log) <= largest_batch(log)
    same(results)


@pytest.mark.broad
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
    assert alone.read_text() == (undisturbed.parent / "scored").read_text()


@pytest.mark.broad
def test_two_identical_sweeps_at_once_execute_every_run_once(tmp_path, undisturbed):
    results, log = tmp_path / "results", tmp_path / "scored"
    sweep = ("-m", "method=dense", "seed=1,2")
    both = [start(results, *sweep, before=counting(log, pause=0.2), small=BRIEF) for _ in range(2)]
    assert [child.wait() for child in both] == [0, 0], [child.text for child in both]
    store = Store(results)
    assert len(store.all()) == 2
    assert not store.unreadable
    # One seed's requests are not told from the other's, so each is counted once for each of them.
    assert len(log.read_text().split()) == 2 * len(set(log.read_text().split()))


@pytest.mark.broad
def test_a_sweep_that_is_started_again_meanwhile_ends_with_all_records(tmp_path, undisturbed):
    results, log = tmp_path / "results", tmp_path / "scored"
    sweep = ("-m", "method=dense", "seed=1,2")
    first = start(results, *sweep, before=counting(log, pause=0.5), small=BRIEF)
    wait_for(lambda: lines(results) > 0)
    # Otherwise the first could end before the second has started, on a busy machine.
    first.kill(signal.SIGSTOP)
    second = start(results, *sweep, before=counting(log), small=BRIEF)
    wait_for(lambda: second.says("waiting for"))
    first.kill(signal.SIGCONT)
    assert [child.wait() for child in (first, second)] == [0, 0], [first.text, second.text]
    for record in Store(results).all():
        assert record.id[:8] in first.text and record.id[:8] in second.text
    assert len(log.read_text().split()) == 2 * len(set(log.read_text().split()))
    assert len(list((results / "sweeps").iterdir())) == 1


@pytest.mark.broad
def test_a_sweep_that_is_killed_from_outside_goes_on(tmp_path, undisturbed):
    results, log = tmp_path / "results", tmp_path / "scored"
    sweep = ("-m", "method=dense", "seed=1,2")
    child = start(results, *sweep, before=counting(log, pause=0.5), small=BRIEF)
    wait_for(lambda: len(Store(results).ids()) == 1 and lines(results) > 1)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    whole = Store(results).ids()
    code, said = run(results, *sweep, before=counting(log), small=BRIEF)
    assert code == 0, said
    assert len(Store(results).all()) == 2
    assert set(whole) < set(Store(results).ids())
    assert scored_twice(log) - len(set(log.read_text().split())) <= largest_batch(log)
    assert not list((results / "unfinished").iterdir())
