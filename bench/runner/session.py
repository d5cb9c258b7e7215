"""Session: what consecutive runs of a process share.

Loading a model, building a benchmark's tasks and connecting processes can take longer than a run,
so runs share them. Closing a session frees the memory, which matters in a long-lived process such
as a notebook.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bench import plugins
from bench.data import hub
from bench.device.devices import generators_restored

if TYPE_CHECKING:
    from bench.estimation.run_estimate import Estimator
    from bench.evaluation import PlanCache
    from bench.evaluation.distributed import ProcessGroup
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.records import SizeAndWork
    from bench.schema import CostsConfig, ModelConfig

    DenseKey = tuple[str, str, ModelConfig, CostsConfig]
    """Fingerprint, network config and config of a model, and the shapes for counting costs."""


# Variables of lm-eval, Hydra, Ray and slimbench. Those for offline use are restored by `hub`.
_VARIABLES = (
    "DISABLE_MULTIPROC",
    "HYDRA_FULL_ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_USAGE_STATS_ENABLED",
    # Set by a job, which may run in this process.
    plugins.PROJECT_VARIABLE,
)


@contextmanager
def host_process_restored() -> Iterator[None]:
    """Restore the environment variables and random generators that a run changes.

    `bench.run` may be called in a long-lived process such as a notebook, which an offline run must
    not leave offline. Calls from several threads take turns.
    """
    # Calls must not overlap, because Hydra reads sys.argv and methods draw from global generators.
    with _ONE_AT_A_TIME, _variables_restored():
        yield


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _variables_restored() -> Iterator[None]:
    # Only these variables, because libraries imported during a call may set others that they need
    # for the rest of the process.
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        with hub.offline_switch_restored(), generators_restored():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Session:
    """Owns the loaded base model, the planned benchmarks and the process group.

    Each is created on first use and released by `close` or at the end of a `with` block. A closed
    session can be used again and starts empty. A session does not own the models that a run returns
    to its caller.

    With `freezes`, objects created before the first model are excluded from garbage collection
    until the session is closed. Memory is measured after a garbage collection, which would
    otherwise traverse a million objects of imports and plans. Use it only in processes of the
    suite.
    """

    _estimator: Estimator | None = None

    def __init__(self, *, freezes: bool = False) -> None:
        self._freezes = freezes
        self._frozen = False

    @cached_property
    def base_model(self) -> BaseModelCache:
        """Cache of the unchanged model that runs share."""
        if self._freezes and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._frozen = True
        return BaseModelCache()

    @cached_property
    def benchmarks(self) -> PlanCache:
        """Cache of the planned benchmarks that runs share."""
        from bench.evaluation import PlanCache

        return PlanCache()

    @cached_property
    def dense_counts(self) -> dict[DenseKey, SizeAndWork]:
        """Cached sizes and FLOPs of unchanged models."""
        return {}

    @property
    def estimator(self) -> Estimator | None:
        """Estimator for this machine, or None if its rates are unknown."""
        from bench.estimation.boards import known_here
        from bench.estimation.run_estimate import Estimator

        # Looked up each time, because rates depend on the number of threads of the run.
        here, held = known_here(), self._estimator
        if held is None or held.hardware != here:
            self._estimator = held = None if here is None else Estimator(here)
        return held

    @cached_property
    def process_group(self) -> ProcessGroup:
        """The process group of a distributed run; connects on first use."""
        from bench.evaluation.distributed import current_process_group

        return current_process_group()

    def close(self) -> None:
        """Free the model and the benchmarks, and disconnect from other processes."""
        held = self.__dict__
        held.pop("benchmarks", None)
        held.pop("dense_counts", None)
        self._estimator = None
        if "base_model" in held:
            self.base_model.release()
            del self.base_model
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
        # Only a group that this session has connected; another one may belong to another session.
        if "process_group" in held:
            from bench.evaluation.distributed import leave_process_group

            del self.process_group
            leave_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        # Jobs are pickled with the session that started them, but without its model: a worker has
        # its own session, which all of its jobs share.
        return _worker_session, ()


@functools.cache
def _worker_session() -> Session:
    """Return the session of a worker process, which exists as long as the process."""
    return Session()


class BaseModelCache:
    """Holds the unchanged model of one source, so that a sweep loads it once.

    A run that changes the model gets its own copy.
    """

    def __init__(self) -> None:
        self._source: ModelSource | None = None
        self._model: Model | None = None

    def acquire(self, source: ModelSource, will_change: bool) -> Model:
        """Return the model of `source`, loading it unless it is already cached.

        Without `will_change` this is the cached model itself, which must not be modified. With it,
        the caller gets a copy if memory allows. Otherwise it gets the cached model, which is loaded
        again for the next run.
        """
        # Imported here, because a finished sweep is answered without torch.
        from bench.device import devices
        from bench.models import loading

        if self._model is None or self._source != source:
            # Before loading, because two models may not fit into memory.
            self.release()
            self._source, self._model = source, _copied_if_room(loading.load_model(source))
            devices.release_memory(self._model.device)
        if not will_change:
            return self._model
        if _has_room_for_copy(self._model):
            return self._model.copy()
        given, self._model = self._model, None
        return given

    def peek(self, source: ModelSource) -> Model | None:
        """Return the cached model of `source` for reading, or None if it was given away."""
        return self._model if self._source == source else None

    def release(self) -> None:
        """Drop the cached model and free its memory."""
        if self._model is not None:
            from bench.device import devices

            device = self._model.device
            self._source = self._model = None
            devices.release_memory(device)


def _copied_if_room(loaded: Model) -> Model:
    """Return a copy of a freshly loaded model if memory allows."""
    # On a CPU, a loaded network is 1 to 3 % slower than a copy of it (measured), because its
    # tensors are scattered in memory. Pruned models are copies, so comparing them with the loaded
    # original would bias speed-ups in their favour.
    return loaded.copy() if _has_room_for_copy(loaded) else loaded


def _has_room_for_copy(model: Model) -> bool:
    """Whether the device has room for a second copy, and half as much for activations.

    A network that accelerate has distributed over devices is never copied, because its hooks refer
    to it.
    """
    from bench.device import devices

    if model.config.device_map is not None:
        return False
    return devices.free_bytes(model.device) > 1.5 * devices.network_bytes(model.network)
