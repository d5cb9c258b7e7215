"""A benchmark of labelled images whose data are all there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.data import images
from bench.data.images import ImageSet, Splits
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.memory import Memory
from bench.evaluation.scoring import Scores
from bench.evaluation.source import Origin, Source
from bench.models.config import Kind
from bench.models.model import Model
from bench.progress import Progress


@dataclass(frozen=True)
class ImageScoring:
    """The images of one benchmark, all of one data set; `sources` says where they came from."""

    benchmark: BenchmarkConfig
    splits: Splits
    scored: ImageSet
    sources: dict[str, Source]

    kinds: ClassVar[tuple[Kind, ...]] = ("image_classifier",)

    def pictures(self, task: str, document: int) -> tuple[()]:
        """Return nothing: a classifier's rows name no image by its hash."""
        return ()

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Classify every image."""
        from bench.evaluation.images.running import score

        return score(model, self, progress, memory)


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
    return ImageScoring(benchmark, splits, scored, _sources(splits, scored))


def _sources(splits: Splits, scored: ImageSet) -> dict[str, Source]:
    """Describe the images that are scored, and those that methods train on."""
    origin: Origin = "embedded" if splits.name == "digits" else "file"
    parts = {splits.name: scored, f"{splits.name} train": splits.train}
    return {
        name: Source(origin, splits.provenance, None, part.fingerprint())
        for name, part in parts.items()
    }
