"""What one harness brings to a plan: its data are there, and it can score any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from bench.evaluation.engine import Asked
    from bench.evaluation.memory import Memory
    from bench.evaluation.result import Metric
    from bench.evaluation.source import Source
    from bench.models.config import Kind
    from bench.models.model import Model
    from bench.progress import Progress

Rows = list[dict[str, Any]]


class Scores(NamedTuple):
    """The metrics of a model, a row for every scored sample, and by which engine it was asked."""

    metrics: list[Metric]
    rows: Rows
    asked: Asked | None = None


class Scoring(Protocol):
    """The tasks of one benchmark as the harness that scores them holds them."""

    @property
    def kinds(self) -> Sequence[Kind]:
        """The kinds of model that it can ask."""

    @property
    def sources(self) -> dict[str, Source]:
        """Where the documents of each task came from."""

    def pictures(self, task: str, document: int) -> Sequence[Image]:
        """Return the images of a document by its place in the data set; none of one of text."""

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Ask a model everything that the memory does not have; answers go there as they come."""
