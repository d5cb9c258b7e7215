"""How rounds are run: in turn, warmed up, again on a loaded machine, and marked."""

import numpy as np
import pytest
import torch

from bench.device.machine import MachineReading
from bench.measurement.interleaving import interleave
from bench.schema import TimingConfig

CPU = torch.device("cpu")


def reading(others):
    return MachineReading(
        threads=1, cores=1, needed=1, others=others, cpu_mhz=None, gpu_mhz=None, slowed=None
    )


@pytest.fixture
def machine(monkeypatch):
    """A machine whose load in each attempt is told beforehand."""

    class Told:
        loads: list

        def __init__(self, device):
            self.reading = reading(Told.loads.pop(0))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("bench.device.machine.MachineMonitor", Told)
    return Told


class Runner:
    """A contestant that takes as long as its script says and remembers when it ran."""

    def __init__(self, name, script, diary):
        self.name, self.script, self.diary = name, iter(script), diary

    def __call__(self):
        self.diary.append(self.name)
        return {"prefill": next(self.script)}


def runners(*scripts):
    diary = []
    return [Runner(name, script, diary) for name, script in zip("ab", scripts, strict=False)], diary


def test_rounds_take_turns_and_every_other_runs_backwards(machine):
    machine.loads = [0.0]
    pair, diary = runners([1.0] * 99, [2.0] * 99)
    rounds = interleave(pair, CPU, TimingConfig(rounds=6))
    assert rounds.warmup_rounds == 6
    assert "".join(diary) == "ab" * 6 + "abba" * 3
    np.testing.assert_array_equal(rounds.seconds["prefill"], [[1.0] * 6, [2.0] * 6])
    assert rounds.note is None


def test_warm_up_lasts_until_times_have_settled(machine):
    machine.loads = [0.0]
    falling = [10, 8, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1]
    (one,), _ = runners(map(float, falling + [1] * 99))
    rounds = interleave([one], CPU, TimingConfig(rounds=5))
    assert rounds.settled
    assert (
        rounds.warmup_rounds == 12
    )  # the first with a median of 1 in its last three and three before
    assert set(rounds.seconds["prefill"][0]) == {1.0}


def test_times_that_never_settle_are_marked(machine):
    machine.loads = [0.0]
    (one,), _ = runners(1.5**n for n in range(99))
    rounds = interleave([one], CPU, TimingConfig(rounds=5, max_warmup_rounds=9))
    assert rounds.note == "times had not settled after 9 rounds"


def test_a_loaded_machine_is_tried_again_and_the_quiet_attempt_is_kept(machine):
    machine.loads = [0.9, 0.0, 0.5]
    (one,), _ = runners([1.0] * 6 + [7.0] * 5 + [1.0] * 5)
    rounds = interleave([one], CPU, TimingConfig(rounds=5, attempts=3))
    assert machine.loads == [0.5]
    assert rounds.note is None
    assert set(rounds.seconds["prefill"][0]) == {1.0}


def test_a_machine_that_stays_loaded_leaves_a_mark_and_its_quietest_attempt(machine):
    machine.loads = [0.9, 0.4]
    (one,), _ = runners([1.0] * 6 + [7.0] * 5 + [2.0] * 5)
    rounds = interleave([one], CPU, TimingConfig(rounds=5, attempts=2))
    assert rounds.note == "the machine was loaded: others kept 0.4 of 1 cores busy"
    assert set(rounds.seconds["prefill"][0]) == {2.0}


def test_rounds_are_added_until_they_are_enough(machine):
    machine.loads = [0.0]
    pair, diary = runners([1.0] * 99, [2.0] * 99)
    asked = []

    def enough(seconds):
        asked.append(seconds["prefill"].shape[1])
        return asked[-1] >= 12

    rounds = interleave(pair, CPU, TimingConfig(rounds=6, max_warmup_rounds=1), enough)
    assert asked == [6, 11, 16]
    assert rounds.count == 16
    # After every look the other one is first.
    assert [diary[2 + 2 * looked] for looked in asked[:-1]] == ["a", "b"]


def test_no_round_is_added_beyond_the_most(machine):
    machine.loads = [0.0]
    pair, _ = runners([1.0] * 99, [2.0] * 99)
    limits = TimingConfig(rounds=6, max_warmup_rounds=1, max_rounds=13)
    assert interleave(pair, CPU, limits, lambda _: False).count == 13


def test_no_round_is_added_when_they_have_taken_too_long(machine):
    machine.loads = [0.0]
    pair, _ = runners([1.0] * 99, [2.0] * 99)
    limits = TimingConfig(rounds=6, max_warmup_rounds=1, max_seconds=1e-9)
    assert interleave(pair, CPU, limits, lambda _: False).count == 6
