"""What one harness brings to a plan: its data are there, and it can score any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bench.evaluation.memory import Memory
    from bench.evaluation.result import Metric
    from bench.evaluation.source import Source
    from bench.models.config import Kind
    from bench.models.model import Model
    from bench.progress import Progress

Rows = list[dict[str, Any]]


class Scoring(Protocol):
    """The tasks of one benchmark as the harness that scores them holds them."""

    @property
    def kinds(self) -> Sequence[Kind]:
        """The kinds of model that it can ask."""

    @property
    def sources(self) -> dict[str, Source]:
        """Where the documents of each task came from."""

    def score(self, model: Model, progress: Progress, memory: Memory) -> tuple[list[Metric], Rows]:
        """Return the metrics of a model, and a row for every scored sample.

        What the memory has is not asked again, and what is asked goes there as it is answered.
        """
