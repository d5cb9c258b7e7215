"""Image classification: its data, its scores.

Top-1 accuracy of a classifier.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bench.data import image_catalogue, image_sets
from bench.data.image_sets import ImageSet, Splits
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import DocumentSource, Origin, SampleRows, ScoredBenchmark
from bench.evaluation.metrics import TaskMetric
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.classifiers.classifier import Classifier
from bench.models.model import Model
from bench.schema import BenchmarkConfig, ModelKind
from bench.ui import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ImageHarness:
    """The images of one benchmark, all from one data set; `sources` states where they came from."""

    benchmark: BenchmarkConfig
    splits: Splits
    scored: ImageSet
    sources: dict[str, DocumentSource]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("image_classifier",)

    def images(self, task: str, document: int) -> tuple[()]:
        """Return nothing: a classifier's rows do not reference images by hash."""
        return ()

    def score(self, model: Model, progress: Progress, memory: ResponseCache) -> ScoredBenchmark:
        """Classify every image."""

        return score_images(model, self, progress, memory)


def plan_images(benchmark: BenchmarkConfig, *, offline: bool) -> ImageHarness:
    """Find and read the images that a benchmark scores.

    Raises:
        MissingData: the folder is not given or does not hold the data set.
        UserError: no data set has this name, or it has no held-out images.
    """
    asked = benchmark.images
    splits = image_catalogue.load_image_set(
        asked.data, asked.folder, download=asked.download and not offline
    )
    if asked.split == "validation":
        # From here on the held-out part of the training set plays the role of the test set, so that
        # choosing hyperparameters never sees test images.
        splits = splits.for_selection()
    scored = splits.test
    if benchmark.limit is not None:
        scored = image_sets.Subset(scored, range(min(benchmark.limit, len(scored))))
    return ImageHarness(benchmark, splits, scored, _sources(splits, scored))


def _sources(splits: Splits, scored: ImageSet) -> dict[str, DocumentSource]:
    """Describe the images that are scored, and those that methods train on."""
    origin: Origin = "embedded" if splits.name == "digits" else "file"
    # The training images enter the run's identity too: a method that trains gives other weights on
    # other images, although the benchmark scores the same.
    parts = {splits.name: scored, f"{splits.name} train": splits.train}
    return {
        name: DocumentSource(origin, splits.provenance, None, part.fingerprint())
        for name, part in parts.items()
    }


ACCURACY = "acc"


def score_images(
    model: Model, scoring: ImageHarness, progress: Progress, memory: ResponseCache
) -> ScoredBenchmark:
    """Return the accuracy and one row per image.

    Raises:
        UserError: the network is built for images of a different shape or classes.
    """
    network = model.network
    assert isinstance(network, Classifier)
    network.config.refuse_mismatched_images(scoring.splits.name, scoring.splits.shape)
    count = len(scoring.scored)

    def work(places: Sequence[int]) -> SampleRows:
        image_BCHH, label_B = scoring.scored.fetch(torch.tensor(places), None)
        # The weights set device and dtype, whatever a method did to the network.
        weight = next(network.parameters())
        with torch.inference_mode():
            # Softmax in float32: in half precision, the probabilities of close classes would round
            # to a tie.
            probability_BK = network(image_BCHH.to(weight)).float().softmax(-1).cpu()
        return _sample_rows(scoring.splits.name, places, label_B, probability_BK)

    network.eval()
    batches = AdaptiveBatches(scoring.benchmark.batch_size, model.device, progress)
    keys = [request_key("image", scoring.splits.name, place) for place in range(count)]
    with progress.phase(f"{model.name} on {scoring.splits.name}", count):
        rows = memory.batched(keys, range(count), [1] * count, batches, work, progress)
    return ScoredBenchmark([_accuracy_metric(scoring, [row[ACCURACY] for row in rows])], rows)


def _sample_rows(
    task: str, places: Sequence[int], label_B: Tensor, probability_BK: Tensor
) -> SampleRows:
    """Return one row per image; `probability` is that of the predicted class."""
    highest_B, predicted_B = probability_BK.max(-1)
    right_B = (predicted_B == label_B).double()
    columns = (places, label_B.tolist(), predicted_B.tolist(), highest_B.tolist(), right_B.tolist())
    rows: list[dict[str, Any]] = []
    for place, label, predicted, probability, right in zip(*columns, strict=True):
        answer = {"prediction": str(predicted), "probability": probability, ACCURACY: right}
        rows.append({"task": task, "doc_id": place, "target": str(label), **answer})
    return rows


def _accuracy_metric(scoring: ImageHarness, right: list[float]) -> TaskMetric:
    """Return the accuracy with the standard error of a Bernoulli mean, n - 1 in its denominator."""
    count, share = len(right), sum(right) / len(right)
    return TaskMetric(
        benchmark=scoring.benchmark.name,
        task=scoring.splits.name,
        metric=ACCURACY,
        filter="none",
        shots=0,
        split=scoring.benchmark.images.split,
        value=share,
        stderr=math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None,
        n=count,
        higher_is_better=True,
        headline=True,
        task_version=None,
    )
