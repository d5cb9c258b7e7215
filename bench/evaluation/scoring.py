"""Interface of a benchmark whose data are loaded and that can score any model."""

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
    """The metrics of a model, one row per scored sample, and the backend report if there is one."""

    metrics: list[Metric]
    rows: Rows
    asked: Asked | None = None


class Scoring(Protocol):
    """The tasks of one benchmark, as held by the harness that scores them."""

    @property
    def kinds(self) -> Sequence[Kind]:
        """The kinds of model that the harness supports."""

    @property
    def sources(self) -> dict[str, Source]:
        """Where the documents of each task came from."""

    def pictures(self, task: str, document: int) -> Sequence[Image]:
        """Return the images of a document, given its index in the data set; empty for text."""

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Score a model; requests found in the response cache are skipped, new ones added to it."""
