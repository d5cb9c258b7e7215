"""What every test has: no network, a fixed thread count, a results folder of its own."""

import functools
import gc
import os
import socket
from collections import defaultdict
from itertools import count

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Off a terminal every phase is a line on stderr, and many tests expect none or exactly one line.
os.environ.setdefault("BENCH_LOG_LEVEL", "INFO")

# Tiny networks gain nothing from a second thread, and wait for it when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

# `make test` draws the same examples everywhere; `make test-all` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("searching", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection that leaves this machine fails the test that opens it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise AssertionError(f"a test opened a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def no_estimates():
    """Runs say and keep no estimate, wherever `bench estimate` has measured this machine before.

    For the whole session, since fixtures of a module run before those of a test.
    """
    from bench.estimation import boards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boards, "_remembered", lambda *_: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def patched_session():
    """`Session(...)` takes arguments before, between and after the patches of `shared_session`.

    Once a class has had a `__new__` of its own and lost it, `object.__new__` refuses arguments.
    """
    from bench.runner.session import Session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__new__", lambda cls, **_: object.__new__(cls))
        yield


@pytest.fixture(autouse=True)
def shared_session(request, monkeypatch):
    """Commands in one test process share a session, or each would load the model again.

    Tests marked `own_session` get the real thing, which frees everything when a command ends.
    """
    if "own_session" in request.keywords:
        return
    from bench.runner.session import Session

    monkeypatch.setattr(Session, "__new__", lambda cls, **_: _shared(Session))
    monkeypatch.setattr(Session, "close", lambda self: None)


@functools.cache
def _shared(kind):
    return object.__new__(kind)


@pytest.fixture
def forget_sources():
    """Forget what the process remembers of source files, as a new process would."""
    from bench.data import digests

    def forget():
        for cached in vars(digests).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()

    forget()
    yield forget
    forget()


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items):
    """Mark what `make test` leaves to `make test-broad`, and skip tests of a GPU without one."""
    import torch

    _mark_beyond_samples(items)

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _mark_beyond_samples(items):
    """Of a test marked sample(n), mark all parameters as broad but n, evenly spaced."""
    parameters = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            parameters[item.path, item.originalname].append(item)
    for found in parameters.values():
        (count,) = found[0].get_closest_marker("sample").args
        kept = {round(place * (len(found) - 1) / max(1, count - 1)) for place in range(count)}
        for place, item in enumerate(found):
            if place not in kept:
                item.add_marker(pytest.mark.broad)


_finished = count(1)


def pytest_collection_finish():
    """Leave out of garbage collection what importing and collecting made, which stays anyway."""
    _freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_logfinish():
    """Leave out what tests imported and share, too: most of it comes with the first ones.

    Runs collect garbage to read memory, and would look through a million such objects each time.
    """
    finished = next(_finished)
    if finished >= 8 and finished & (finished - 1) == 0:
        _freeze()


def _freeze():
    gc.collect()
    gc.freeze()
