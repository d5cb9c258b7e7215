"""In fp32 on the CPU a run is its config: repeated it is the same, however it is cut into work."""

import numpy as np
import pandas as pd
import pytest
import torch

from bench.records import Store, samples
from tests.faults.killable_runs import timeless

RUN = (
    "run", "method=[random_experts,camera_p]", "ratio=0.3", "benchmark.tasks=[arc_easy,boolq]",
    "benchmark.perplexity.english.window=64", "benchmark.num_fewshot=1",
)  # fmt: skip
TOLERANCE = 1e-4
"""Nats by which a log-likelihood may differ when sums are taken in another order."""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ran(bench, place, *arguments):
    """Run in a results folder of its own; return the record and its samples."""
    bench.results = bench.results.parent / place
    code, _, err = bench(*RUN, *arguments)
    assert code == 0, err
    (record,) = Store(bench.results).all()
    return record, samples(record.id, bench.results)


@pytest.mark.broad
def test_repeated_a_run_is_the_same_to_the_last_bit(bench):
    (first, ours), (second, theirs) = ran(bench, "a", "threads=1"), ran(bench, "b", "threads=1")
    assert first.started != second.started
    assert timeless(first) == timeless(second)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.broad
def test_batch_size_and_threads_change_nothing_beyond_the_tolerance(bench):
    record, whole = ran(bench, "a", "threads=1", "benchmark.batch_size=32")
    for place, how in (("b", ("threads=1", "benchmark.batch_size=3")), ("c", ("threads=2",))):
        other, found = ran(bench, place, *how)
        assert (other.id == record.id) == ("threads=2" in how)
        assert list(found.prompt_hash) == list(whole.prompt_hash)
        for ours, theirs in zip(whole.loglikelihoods, found.loglikelihoods, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        for ours, theirs in zip(record.metrics, other.metrics, strict=True):
            assert theirs.value == pytest.approx(ours.value, rel=TOLERANCE)


@pytest.mark.broad
def test_the_seed_decides_what_is_drawn_and_not_the_shots(bench):
    first, ours = ran(bench, "a", "seed=1")
    again, _ = ran(bench, "b", "seed=1")
    other, theirs = ran(bench, "c", "seed=2")
    assert timeless(first) == timeless(again)
    assert list(ours.prompt) == list(theirs.prompt)
    assert first.metrics != other.metrics
