"""The interface of a harness, and its results: scores, backend report, document sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from bench.data.digests import digest, fingerprint
from bench.schema import Backend

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import nn

    from bench.data.chat import Tokenizer
    from bench.evaluation.metrics import SampleRow
    from bench.evaluation.response_cache import ResponseCache
    from bench.models.model import Model
    from bench.records.record import Metric, MissingMeasurement, TaskEvidence
    from bench.schema import ModelConfig, ModelKind
    from bench.ui import Progress

SEED = 1234
"""Seed of few-shot examples (the harnesses' default) and of sampled generation."""


def number_within(limit: float | None, available: int) -> int:
    """Return the number of documents within a limit, with lm-eval's rule for fractions."""
    if limit is None:
        return available
    return min(available, limit if isinstance(limit, int) else math.ceil(available * limit))


ATTEMPT_FIELDS = ("tokens_per_batch", "halved", "padded_tokens", "computed_tokens")
"""Fields of a backend report that depend on free memory or on an interrupted attempt."""


@dataclass
class BackendReport:
    """The requested backend, the one used, and the `reasons` if they differ.

    `tokens_per_batch` is the first estimate of the prefix-sharing backend's token budget, and
    `halved` how often memory ran out afterwards. `computed_tokens` is the number of tokens that
    went through the network, `padded_tokens` the number with the padded backend.
    """

    requested: Backend
    used: Backend = "padded"
    reasons: list[str] = field(default_factory=list)
    tokens_per_batch: int | None = None
    halved: int = 0
    padded_tokens: int = 0
    computed_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        """Return JSON values, with `ATTEMPT_FIELDS` nested under `spent`."""
        values = asdict(self)
        # The other fields are the same whenever a run is repeated or resumed.
        spent = {name: values.pop(name) for name in ATTEMPT_FIELDS}
        return {**values, "spent": spent}


def select_backend(
    model: Model, requested: Backend, unsupported: str | None, progress: Progress
) -> BackendReport:
    """Return the backend to use: the requested one, or the padded one with the reason.

    `unsupported` is the reason if the model does not support prefix sharing, or else None.
    """
    report = BackendReport(requested)
    if requested == "prefix_sharing" and unsupported is None:
        report.used = "prefix_sharing"
    elif requested == "prefix_sharing" and unsupported is not None:
        report.reasons.append(unsupported)
        progress.warn(f"{model.name} uses the padded backend: {unsupported}")
    return report


class ScoredBenchmark(NamedTuple):
    """The metrics of a model, one row per scored sample, and the backend report if there is one.

    `missing` lists the headlines without a value, with the reason. `evidence` is that of each task
    (`bench.evaluation.evidence`).
    """

    metrics: list[Metric]
    rows: list[SampleRow]
    backend_report: BackendReport | None = None
    missing: Sequence[MissingMeasurement] = ()
    evidence: Sequence[TaskEvidence] = ()

    def extended(self, other: ScoredBenchmark) -> ScoredBenchmark:
        """Return the results of both, with this one's backend report."""
        return ScoredBenchmark(
            [*self.metrics, *other.metrics],
            [*self.rows, *other.rows],
            self.backend_report,
            [*self.missing, *other.missing],
            [*self.evidence, *other.evidence],
        )


def tell_results(metrics: Iterable[Metric], progress: Progress) -> None:
    """Send the headline numbers to the watcher of the run."""
    for metric in metrics:
        if metric.headline and metric.value is not None:
            progress.result(metric.task, metric.value, metric.stderr)


class Harness(Protocol):
    """The tasks of one benchmark, as held by the harness that scores them."""

    @property
    def kinds(self) -> Sequence[ModelKind]:
        """The kinds of model that the harness supports."""

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Where the documents of each task came from."""

    def check_network(
        self, model: ModelConfig, network: nn.Module, tokenizer: Tokenizer | None
    ) -> None:
        """Raise UserError unless the tasks fit the network (without weights) and its tokenizer.

        A classifier has no tokenizer.
        """

    @property
    def definitions(self) -> dict[str, str]:
        """Hash of each task's definition: its prompt, metrics and filters, with their code."""

    @property
    def folders(self) -> frozenset[Path]:
        """Folders of the harness's task files and of their code."""

    def images(self, task: str, document: int) -> Sequence[Image]:
        """Return the images of a document, given its index in the data set; empty for text."""

    def score(self, model: Model, progress: Progress, cache: ResponseCache) -> ScoredBenchmark:
        """Score a model; cached responses are reused, and new ones are added to the cache."""

    def rescore(self, rows: Sequence[SampleRow]) -> ScoredBenchmark:
        """Score the answers in sample rows; raise UserError if they do not suffice."""


Origin = Literal["hub", "embedded", "file", "harness"]


@dataclass(frozen=True)
class DocumentSource:
    """One data set: its origin, its location there, its revision and a content fingerprint.

    `revision` is the commit on the hub. It is None for embedded data and local files, whose
    fingerprint is a hash of the content itself. Origin `harness` marks data generated by a task's
    own code.
    """

    origin: Origin
    location: str
    revision: str | None
    fingerprint: str


def file_source(files: list[Path]) -> DocumentSource:
    """Describe local files; the fingerprint of one is the SHA-256 of its bytes.

    That of several files includes their names, which determine the splits.
    """
    if len(files) == 1:
        return DocumentSource("file", str(files[0]), None, digest(files[0]))
    return DocumentSource("file", str(files[0].parent), None, fingerprint(files))


def hub_source(location: str, revision: str | None, loaded: str) -> DocumentSource:
    """Describe a data set on the hub; `loaded` identifies its content if no commit is known."""
    return DocumentSource("hub", location, revision, f"{location}@{revision or loaded}")
