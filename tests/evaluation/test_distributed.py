"""Work divided over processes: shares, and two real processes that write one record."""

import os
import socket
import subprocess
import sys

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench
from bench.evaluation.distributed import LAUNCHER_VARIABLES, ProcessGroup, hidden_from_harness
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest
from bench.evaluation.text.scorers import DistributedScorer


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 5))
def test_every_item_belongs_to_one_process_and_work_is_even(work, count):
    shares = [ProcessGroup(number, count).shard(work) for number in range(count)]
    assert [place for share in shares for place in share] == list(range(len(work)))
    loads = [sum(work[place] for place in share) for share in shares]
    assert max(loads) <= sum(work) / count + max(work, default=0)


def test_one_process_does_everything():
    scattered = ProcessGroup().scatter_work(
        [0, 1, 2], [1, 1, 1], lambda mine: [[(n, "ABC"[n]) for n in mine]]
    )
    assert list(scattered) == [[(0, "A"), (1, "B"), (2, "C")]]


class Spelling:
    """Scores a question by its tokens, two questions a batch."""

    def score(self, questions):
        for first in range(0, len(questions), 2):
            yield [
                (n, Loglikelihood(float(sum(questions[n].inputs)), True))
                for n in range(first, min(first + 2, len(questions)))
            ]


def test_a_spread_scorer_yields_its_own_answers_and_then_the_others(monkeypatch):
    asked = [LoglikelihoodRequest([number % 7, number], [1]) for number in range(20)]
    found = {}
    for number in range(3):
        monkeypatch.setattr(ProcessGroup, "all_gather", lambda _, own: own)
        own = [
            a
            for batch in DistributedScorer(Spelling(), ProcessGroup(number, 3)).score(asked)
            for a in batch
        ]
        assert 4 <= len(own) <= 9
        found |= own
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda _, own: list(found.items()))
    *_, last = DistributedScorer(Spelling(), ProcessGroup(1, 3)).score(asked)
    whole = [
        a for batch in DistributedScorer(Spelling(), ProcessGroup(1, 3)).score(asked) for a in batch
    ]
    assert len(last) > 4
    assert dict(whole) == {
        n: Loglikelihood(float(sum(q.inputs)), True) for n, q in enumerate(asked)
    }
    assert len(whole) == 20


def test_a_harness_does_not_see_the_others(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "3")
    with hidden_from_harness():
        assert not set(LAUNCHER_VARIABLES) & os.environ.keys()
    assert all(os.environ[name] == "3" for name in LAUNCHER_VARIABLES)


TEXT = [
    "model=micro_moe", "benchmark=nine_tasks_micro", "benchmark.tasks=[arc_easy]",
    "+benchmark.perplexity.english.text=english", "+benchmark.perplexity.english.window=64",
]  # fmt: skip
IMAGES = ["model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[pope]"]


@pytest.mark.broad
@pytest.mark.parametrize("asked", [TEXT, pytest.param(IMAGES, marks=pytest.mark.slow)])
def test_two_processes_write_the_record_of_one(tmp_path, asked):
    common = [*asked, "benchmark.limit=8", "tracker=none", "method=[]"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "bench",
        "run",
        *common,
        f"results_dir={tmp_path}/two",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert " on " in said[0][0]
    assert said[1][0] == ""
    (two,) = bench.records.load(tmp_path / "two")["run"].unique()
    (one,) = bench.run([*common, f"results_dir={tmp_path}/one"])
    assert one.id == two
    samples = [bench.records.samples(one.id, tmp_path / name) for name in ("one", "two")]
    pandas.testing.assert_frame_equal(*(table.drop(columns="loglikelihoods") for table in samples))
    for ours, theirs in zip(*(table["loglikelihoods"] for table in samples), strict=True):
        assert list(ours) == pytest.approx(list(theirs), abs=1e-5)
