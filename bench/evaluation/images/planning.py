"""A benchmark of labelled images whose data are all there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.data import images
from bench.data.images import ImageSet, Splits
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.result import Metric
from bench.evaluation.scoring import Rows
from bench.evaluation.source import Origin, Source
from bench.models.config import Kind
from bench.models.model import Model
from bench.progress import Progress


@dataclass(frozen=True)
class ImageScoring:
    """The images of one benchmark, all of one data set."""

    benchmark: BenchmarkConfig
    splits: Splits
    scored: ImageSet
    source: Source

    kinds: ClassVar[tuple[Kind, ...]] = ("image_classifier",)

    @property
    def sources(self) -> dict[str, Source]:
        """Where the images came from."""
        return {self.splits.name: self.source}

    def score(self, model: Model, progress: Progress) -> tuple[list[Metric], Rows]:
        """Classify every image."""
        from bench.evaluation.images.running import score

        return score(model, self, progress)


def plan_images(benchmark: BenchmarkConfig, *, offline: bool) -> ImageScoring:
    """Find and read the images that a benchmark scores.

    Raises:
        MissingData: the folder is not given or does not hold the set.
        UserError: there is no set of that name, or none of its images are held out.
    """
    asked = benchmark.images
    splits = images.load(asked.data, asked.folder, download=asked.download and not offline)
    if asked.split == "validation":
        splits = splits.for_choosing()
    scored = splits.test
    if benchmark.limit is not None:
        scored = images.Part(scored, range(min(benchmark.limit, len(scored))))
    return ImageScoring(benchmark, splits, scored, _source(splits, scored))


def _source(splits: Splits, scored: ImageSet) -> Source:
    """Describe the images; no training image counts, for those are the methods' business."""
    origin: Origin = "embedded" if splits.name == "digits" else "file"
    return Source(origin, splits.provenance, None, scored.fingerprint())
