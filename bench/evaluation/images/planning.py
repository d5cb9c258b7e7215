"""An image classification benchmark whose data are loaded."""

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
    """The images of one benchmark, all from one data set; `sources` states where they came from."""

    benchmark: BenchmarkConfig
    splits: Splits
    scored: ImageSet
    sources: dict[str, Source]

    kinds: ClassVar[tuple[Kind, ...]] = ("image_classifier",)

    def pictures(self, task: str, document: int) -> tuple[()]:
        """Return nothing: a classifier's rows do not reference images by hash."""
        return ()

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Classify every image."""
        from bench.evaluation.images.running import score

        return score(model, self, progress, memory)


def plan_images(benchmark: BenchmarkConfig, *, offline: bool) -> ImageScoring:
    """Find and read the images that a benchmark scores.

    Raises:
        MissingData: the folder is not given or does not hold the data set.
        UserError: no data set has this name, or it has no held-out images.
    """
    asked = benchmark.images
    splits = images.load(asked.data, asked.folder, download=asked.download and not offline)
    if asked.split == "validation":
        # From here on the held-out part of the training set plays the role of the test set, so that
        # choosing hyperparameters never sees test images.
        splits = splits.for_choosing()
    scored = splits.test
    if benchmark.limit is not None:
        scored = images.Part(scored, range(min(benchmark.limit, len(scored))))
    return ImageScoring(benchmark, splits, scored, _sources(splits, scored))


def _sources(splits: Splits, scored: ImageSet) -> dict[str, Source]:
    """Describe the images that are scored, and those that methods train on."""
    origin: Origin = "embedded" if splits.name == "digits" else "file"
    # The training images enter the run's identity too: a method that trains gives other weights on
    # other images, although the benchmark scores the same.
    parts = {splits.name: scored, f"{splits.name} train": splits.train}
    return {
        name: Source(origin, splits.provenance, None, part.fingerprint())
        for name, part in parts.items()
    }
