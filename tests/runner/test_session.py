"""A session shares a model between runs, and frees it when it is closed."""

import gc
import pickle
import weakref

import pytest

import bench
from bench.records import EstimatedPhase, Store
from bench.runner import execute
from bench.runner.session import BaseModelCache, Session

SMALL = [
    "model=micro_lenet", "benchmark=images", "benchmark.limit=2", "threads=1", "tracker=none",
]  # fmt: skip

pytestmark = pytest.mark.own_session


@pytest.mark.broad
def test_the_model_is_loaded_once_and_freed_at_the_end(tmp_path, monkeypatch):
    given = []
    acquire = BaseModelCache.acquire

    def watched(self, source, will_change):
        model = acquire(self, source, will_change)
        given.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(BaseModelCache, "acquire", watched)
    with bench.Session() as session:
        for seed in (1, 2):
            bench.run([*SMALL, f"seed={seed}", f"results_dir={tmp_path}"], session=session)
        gc.collect()
        assert given[0]() is not None
        assert given[0]() is given[1]()
    gc.collect()
    assert given[0]() is None

    bench.run([*SMALL, "seed=3", f"results_dir={tmp_path}"])
    gc.collect()
    assert given[2]() is None


def test_a_run_that_resumes_keeps_no_estimate(tmp_path, monkeypatch):
    phase = EstimatedPhase(phase="x", low=1, high=2, bound_by="Python", peak_bytes=0)
    monkeypatch.setattr(execute, "_estimate", lambda *_: (phase,))
    (first,) = bench.run([*SMALL, f"results_dir={tmp_path}"])
    left = Store(tmp_path).unfinished(first.id)
    left.mkdir(parents=True)
    (left / "responses.jsonl").touch()
    (again,) = bench.run([*SMALL, f"results_dir={tmp_path}", "force=true"])
    assert (first.estimate, again.estimate) == ((phase,), ())


def test_a_closed_session_starts_empty_again():
    with Session() as session:
        model, benchmarks = session.base_model, session.benchmarks
        assert session.base_model is model
        assert session.benchmarks is benchmarks
    assert session.base_model is not model
    assert session.benchmarks is not benchmarks


def test_a_session_that_travels_takes_no_model_along():
    session = Session()
    session.base_model = object()  # cannot be pickled by value to another session
    sent = pickle.dumps(session)
    arrived = pickle.loads(sent)
    assert isinstance(arrived, Session)
    assert "base_model" not in vars(arrived)
    # All jobs of a worker share one session.
    assert pickle.loads(sent) is arrived
