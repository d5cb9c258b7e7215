"""A session shares a model between runs, and frees it when it is closed."""

import gc
import pickle
import weakref

import pytest

import bench
from bench.cli.main import main
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

    def watched(self, source, *, will_change):
        model = acquire(self, source, will_change=will_change)
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


@pytest.fixture
def thawed():
    """A process that has frozen nothing, as the tests' own has."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def test_a_command_leaves_what_came_before_its_model_out_of_collections(thawed):
    with Session() as session:
        assert session.base_model is not None
        assert gc.get_freeze_count() == 0
    before = [object()]
    with Session(freezes=True) as session:
        assert gc.get_freeze_count() == 0
        assert session.base_model is session.base_model
        assert gc.is_tracked(before)
        assert not any(each is before for each in gc.get_objects())
        later = [object()]
        assert any(each is later for each in gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen(thawed):
    gc.freeze()
    with Session(freezes=True) as session:
        assert session.base_model is not None
    assert gc.get_freeze_count() > 0
    assert main(["ls", "tables"]) == 0
    assert gc.get_freeze_count() > 0


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
