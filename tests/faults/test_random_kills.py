"""kill -9 at random moments of fresh runs: then the same record, and nothing scored twice.

The moments are drawn from the seed that a failing test's name ends with.
"""

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from bench.cli.main import main
from bench.records import samples
from tests.faults.killable_runs import (
    SMALL,
    counting,
    largest_batch,
    lines,
    only,
    run,
    scored_twice,
    start,
    timeless,
    wait_for,
)

pytestmark = pytest.mark.slow
TEXT = ("method=camera_p", "ratio=0.4", *SMALL)
IMAGES = (
    "model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[gqa,pope]",
    "benchmark.limit=12", "benchmark.batch_size=4", "method=yopo_12", "costs.length=32",
    "threads=1", "tracker=none",
)  # fmt: skip
CASES = {
    f"{name} {backend}": (*arguments, f"benchmark.backend={backend}")
    for name, arguments in (("text", TEXT), ("images", IMAGES))
    for backend in ("prefix_sharing", "padded")
}


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to, in a warm process: how long, and in how many batches."""

    arguments: tuple[str, ...]
    results: Path
    seconds: float
    batches: int
    largest: int

    def assert_same(self, results):
        ours, theirs = only(results), only(self.results)
        assert timeless(ours) == timeless(theirs)
        pd.testing.assert_frame_equal(
            samples(ours.id, results), samples(theirs.id, self.results), check_exact=True
        )
        assert not list((results / "unfinished").iterdir())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return what makes the undisturbed run of a case, once."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            arguments = CASES[case]
            # Once in this process, so that its children find everything loaded.
            assert main(["run", *arguments, f"results_dir={folder / 'warm'}"]) == 0
            began, log = time.monotonic(), folder / "scored"
            code, said = run(folder / "results", *arguments, before=counting(log), small=())
            assert code == 0, said
            seconds = time.monotonic() - began
            engine = only(folder / "results").provenance["backend"]
            assert engine["used"] == case.split()[1], engine
            batches = len(log.read_text().splitlines())
            made[case] = Whole(arguments, folder / "results", seconds, batches, largest_batch(log))
        return made[case]

    return make


def ends_as_one_that_was_not_killed(whole, tmp_path, child, log):
    assert child.wait() in (-signal.SIGKILL, 0), child.text
    results = tmp_path / "results"
    code, said = run(results, *whole.arguments, before=counting(log), small=())
    assert code == 0, said
    whole.assert_same(results)
    assert scored_twice(log) <= whole.largest
    assert len(set(log.read_text().split())) == len(
        set((whole.results.parent / "scored").read_text().split())
    )


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment_of_a_text_run(tmp_path, whole, seed):
    case, log = whole("text prefix_sharing"), tmp_path / "scored"
    log.touch()
    # Each seed has a tenth of the run to itself, so that the ten are not all in one phase.
    moment = (seed + random.Random(seed).random()) / 10 * case.seconds
    child = start(tmp_path / "results", *case.arguments, before=counting(log), small=())
    time.sleep(moment)
    child.kill()
    ends_as_one_that_was_not_killed(case, tmp_path, child, log)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in CASES if name != "text prefix_sharing"])
def test_killed_at_any_moment_of_the_scoring(tmp_path, whole, name, seed):
    case, log, draw = whole(name), tmp_path / "scored", random.Random(seed)
    after = draw.randrange(1, case.batches)
    child = start(tmp_path / "results", *case.arguments, before=counting(log, 0.1), small=())
    wait_for(lambda: lines(tmp_path / "results") > after)  # the first line is its header
    time.sleep(draw.uniform(0, 0.2))
    child.kill()
    ends_as_one_that_was_not_killed(case, tmp_path, child, log)
