"""Session: what consecutive runs of a process share.

Loading a model, building a benchmark's tasks and connecting processes can take longer than a run,
so runs share them. Closing a session frees the memory, which matters in a long-lived process such
as a notebook.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bench import plugins
from bench.data import hub
from bench.device.devices import generators_restored
from bench.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from bench.estimation.estimator import Estimator
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


@contextmanager
def shared_state_kept(network: nn.Module, method: str) -> Iterator[None]:
    """Put back what a method changes outside its network, and refuse what decides numbers.

    Settings of the process, such as the working folder or torch's default dtype, are only put back.
    Functions of torch and of the network's classes are what the dense network and all later runs
    compute by: a method that replaces one, or hooks all modules, would change their numbers too.

    Raises:
        UserError: the block replaced such a function, or left a hook on all modules.
    """
    settings = [(get(), get, put) for get, put in _restorable_settings()]
    shared = [_Bindings(owner) for owner in _owners_of_shared_code(network)]
    hooks = {name: set(held) for name, held in _hooks_of_all_modules().items()}
    try:
        yield
    finally:
        for before, get, put in settings:
            if before is not None and get() != before:
                put(before)
        changed = [name for bindings in shared for name in bindings.restore()]
        for name, held in _hooks_of_all_modules().items():
            for key in set(held) - hooks.get(name, set()):
                del held[key]
                changed.append("what every module does (a global hook)")
    if changed:
        raise UserError(
            f"method {method} changes {changed[0]}, by which all other networks of this process "
            "compute, the dense one included: change modules of model.network alone, as "
            "bench.models.network.replace_forward does"
        )


def _restorable_settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how settings of the process that decide numbers or places are read and set."""
    import torch

    return [
        (_working_folder, os.chdir),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, torch.set_default_device),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ]


def _working_folder() -> str | None:
    with suppress(OSError):  # it was removed
        return os.getcwd()  # noqa: PTH109 (as os.chdir takes it)
    return None


def _hooks_of_all_modules() -> dict[str, dict[Any, Any]]:
    """Return torch's dictionaries of hooks that run for every module of the process."""
    from torch.nn.modules import module

    return {
        name: held
        for name, held in vars(module).items()
        if name.startswith("_global_") and isinstance(held, dict)
    }


def _owners_of_shared_code(network: nn.Module) -> list[Any]:
    """Return the modules and classes whose functions other networks of the process run too."""
    import torch
    from torch.nn import functional

    kinds = {kind for module in network.modules() for kind in type(module).__mro__[:-1]}
    names = {kind.__module__ for kind in kinds}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [torch, functional, torch.Tensor, *modules, *kinds]


class _Bindings:
    """The functions and classes that a module or a class binds to its names."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._before = owner, dict(vars(owner))

    def restore(self) -> Iterator[str]:
        """Put back what foreign code has replaced since, and yield the names of it."""
        owner, now = self._owner, dict(vars(self._owner))
        name_of = owner.__name__ if inspect.ismodule(owner) else _name_of_class(owner)
        for name, was in self._before.items():
            if now.get(name) is not was and _is_code(was) and not _of_libraries(now.get(name)):
                setattr(owner, name, was)
                yield f"{name_of}.{name}"
        for name in now.keys() - self._before.keys():
            # A new name matters only where it hides an inherited one.
            inherited = inspect.isclass(owner) and any(name in vars(b) for b in owner.__mro__[1:])
            if inherited and _is_code(now[name]) and not _of_libraries(now[name]):
                delattr(owner, name)
                yield f"{name_of}.{name}"


def _name_of_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_code(value: object) -> bool:
    return callable(value) or isinstance(value, property | staticmethod | classmethod)


def _of_libraries(value: object) -> bool:
    """Whether a function is torch's or transformers' own: they wrap some on their first use."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    # Of a wrapper `__module__` is that of what it wraps.
    module = getattr(value, "__globals__", {}).get("__name__") or getattr(value, "__module__", "")
    return str(module).partition(".")[0] in ("torch", "transformers")


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
        self.freezes = freezes
        self._frozen = False

    @cached_property
    def base_model(self) -> BaseModelCache:
        """Cache of the unchanged model that runs share."""
        if self.freezes and not gc.get_freeze_count():
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
        from bench.estimation.estimator import Estimator

        # Looked up each time, because rates depend on the number of threads of the run.
        here, held = known_here(), self._estimator
        if held is None or held.hardware != here:
            held = None if here is None else Estimator(here, collects=not self.freezes)
            self._estimator = held
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
        self._reading: object = None

    def acquire(self, source: ModelSource, *, will_change: bool) -> Model:
        """Return the model of `source`, loading it unless it is already cached.

        Without `will_change` this is the cached model itself, which must not be modified. With it,
        the caller gets a copy if memory allows. Otherwise it gets the cached model, which is loaded
        again for the next run.
        """
        # Imported here, because a finished sweep is answered without torch.
        from bench.device import devices
        from bench.models import loading

        # Copies share the tokenizer, to which a method may have added tokens.
        changed = self._model is not None and _reading(self._model) != self._reading
        if self._model is None or self._source != source or changed:
            # Before loading, because two models may not fit into memory.
            self.release()
            self._source, self._model = source, _copied_if_room(loading.load_model(source))
            self._reading = _reading(self._model)
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


def _reading(model: Model) -> object:
    """Return what a tokenizer and an image processor show of how they read."""
    tokenizer, images = model.tokenizer, getattr(model.processor, "image_processor", None)
    tokens = None if tokenizer is None else len(tokenizer)
    template = repr(getattr(tokenizer, "chat_template", None))
    return tokens, template, None if images is None else repr(images.to_dict())


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
