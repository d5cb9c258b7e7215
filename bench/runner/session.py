"""Session: what the runs of a process share, held as long as it is open.

Loading a model, building a benchmark's tasks and connecting processes take longer than many runs,
so consecutive runs share them. A host process that goes on, such as a notebook, gets the memory
back when the session is closed.
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
    """Fingerprint, network config and config of a model, and the shapes at which it is counted."""


# Switches of lm-eval, Hydra, Ray and slimbench. Those that keep libraries off the hub are restored
# by `hub`.
_VARIABLES = (
    "DISABLE_MULTIPROC",
    "HYDRA_FULL_ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_USAGE_STATS_ENABLED",
    # A job sets it, and may run in this process.
    plugins.PROJECT_VARIABLE,
)


@contextmanager
def host_process_restored() -> Iterator[None]:
    """Restore the environment variables and generators that a run changes, however it ends.

    `bench.run` may be called in a process that lives on, such as a notebook: an offline run must
    not leave the whole notebook offline. Calls from several threads take turns.
    """
    # Hydra reads sys.argv, and methods draw from the process's generators: one call would execute
    # what another asked for.
    with _ONE_AT_A_TIME, _variables_restored():
        yield


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _variables_restored() -> Iterator[None]:
    # Named variables instead of the whole environment: libraries that are imported during a call
    # keep settings there that they need for the rest of the process.
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

    Each is made on first use, and let go of by `close` or at the end of a `with` block. A closed
    session can be used again; it starts empty. Models that a run returned to the caller are not the
    session's.

    With `freezes`, what the process made before its first model is left out of garbage collections
    until the session is closed. Every reading of memory collects, and would look through a million
    objects of imports and plans. It is for processes whose objects are all the suite's.
    """

    _estimator: Estimator | None = None

    def __init__(self, *, freezes: bool = False) -> None:
        self._freezes = freezes
        self._frozen = False

    @cached_property
    def base_model(self) -> BaseModelCache:
        """The unchanged model that the runs share."""
        if self._freezes and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._frozen = True
        return BaseModelCache()

    @cached_property
    def benchmarks(self) -> PlanCache:
        """The planned benchmarks that the runs share."""
        from bench.evaluation import PlanCache

        return PlanCache()

    @cached_property
    def dense_counts(self) -> dict[DenseKey, SizeAndWork]:
        """Counts of unchanged models, by all that decides them."""
        return {}

    @property
    def estimator(self) -> Estimator | None:
        """Estimates runs on this machine, None where its rates are not known."""
        from bench.estimation.boards import known_here
        from bench.estimation.run_estimate import Estimator

        # Asked each time: the rates depend on the threads, in which runs may differ.
        here, held = known_here(), self._estimator
        if held is None or held.hardware != here:
            self._estimator = held = None if here is None else Estimator(here)
        return held

    @cached_property
    def process_group(self) -> ProcessGroup:
        """This process's place among those of a distributed run; connects on first use."""
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
        # A group that this session did not connect to is left alone: it may be another session's.
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
        # Jobs are pickled with the session that started them. Its model stays here: a worker has a
        # session of its own, which all of its jobs share.
        return _worker_session, ()


@functools.cache
def _worker_session() -> Session:
    """Return the session of a worker process, which ends with it."""
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
        the caller gets a copy if memory allows; otherwise the cached model itself, which is then
        loaded again for the next run.
        """
        # Imported here: a finished sweep is answered without torch.
        from bench.device import devices
        from bench.models import loading

        if self._model is None or self._source != source:
            # Before loading: two models at once may not fit.
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
    # On a CPU, a loaded network is 1 to 3 % slower than any copy of it (measured), since its
    # tensors and modules lie scattered in memory. Pruned models are copies, so comparing them with
    # the loaded original would bias every speed-up in their favour.
    return loaded.copy() if _has_room_for_copy(loaded) else loaded


def _has_room_for_copy(model: Model) -> bool:
    """Whether the device can hold a second copy and half as much again for activations.

    A network that accelerate spread over devices is never copied: its hooks refer to it.
    """
    from bench.device import devices

    if model.config.device_map is not None:
        return False
    return devices.free_bytes(model.device) > 1.5 * devices.network_bytes(model.network)
