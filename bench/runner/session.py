"""Session: what the runs of a process share, held as long as it is open.

Loading a model, building a benchmark's tasks and connecting processes take longer than many runs,
so consecutive runs share them. A host process that goes on, such as a notebook, gets the memory
back when the session is closed.
"""

from __future__ import annotations

import functools
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from bench.evaluation import PlanCache
    from bench.evaluation.distributed import ProcessGroup
    from bench.models.base_model_cache import BaseModelCache
    from bench.records import SizeAndWork
    from bench.schema import CostsConfig, ModelConfig

    DenseKey = tuple[str, str, ModelConfig, CostsConfig]
    """Fingerprint, network config and config of a model, and the shapes at which it is counted."""


class Session:
    """Owns the loaded base model, the planned benchmarks and the process group.

    Each is made on first use, and let go of by `close` or at the end of a `with` block. A closed
    session can be used again; it starts empty. Models that a run returned to the caller are not the
    session's.
    """

    @cached_property
    def base_model(self) -> BaseModelCache:
        """The unchanged model that the runs share."""
        # Imported here: a finished sweep is answered without torch.
        from bench.models.base_model_cache import BaseModelCache

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
        if "base_model" in held:
            self.base_model.release()
            del self.base_model
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
