"""Image classification: the images of a benchmark, and top-1 accuracy of a classifier on them.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bench.data import image_catalogue, image_sets
from bench.data.image_files import UnfitImage
from bench.data.image_sets import ImageSet, Splits
from bench.errors import UserError
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import (
    DocumentSource,
    Origin,
    ScoredBenchmark,
    number_within,
    tell_results,
)
from bench.evaluation.metrics import (
    NON_FINITE_LOGITS,
    SampleRow,
    TaskAnswers,
    settle_metrics,
    task_metric,
)
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.classifiers.classifier import Classifier
from bench.models.model import Model
from bench.records.record import Metric
from bench.schema import BenchmarkConfig, ModelConfig, ModelKind
from bench.ui import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from bench.data.chat import Tokenizer

ACCURACY = "acc"


MAX_AUTO_CLASSIFIED = 1024
"""Images of the first batch with `batch_size=auto`; more are no faster."""


@dataclass(frozen=True)
class ImageHarness:
    """The images of one benchmark, all from one data set; `sources` states where they came from."""

    benchmark: BenchmarkConfig
    splits: Splits
    scored: ImageSet
    sources: dict[str, DocumentSource]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("image_classifier",)

    @property
    def definitions(self) -> dict[str, str]:
        """Return nothing, because top-1 accuracy is computed by the suite itself."""
        return {}

    @property
    def folders(self) -> frozenset[Path]:
        """Return nothing, as for definitions."""
        return frozenset()

    def images(self, task: str, document: int) -> list[Image]:
        """Return an image as the network gets it, scaled to the value range of a picture.

        Raises:
            UserError: the benchmark does not score this image, or it cannot be decoded.
        """
        if task != self.splits.name or document not in range(len(self.scored)):
            raise UserError(f"benchmark={self.benchmark.name} has no image {document} of {task}")
        image_BCHH, _ = self.scored.fetch(torch.tensor([document]), None)
        return [_picture(image_BCHH[0])]

    def check_network(
        self, model: ModelConfig, network: nn.Module, tokenizer: Tokenizer | None
    ) -> None:
        """Raise UserError unless the network fits the images and their classes."""
        assert isinstance(network, Classifier)
        network.config.refuse_mismatched_images(self.splits.name, self.splits.shape)

    def score(self, model: Model, progress: Progress, cache: ResponseCache) -> ScoredBenchmark:
        """Return the accuracy and one row per image."""
        network = model.network
        assert isinstance(network, Classifier)
        task, count = self.splits.name, len(self.scored)

        def classify(indices: Sequence[int]) -> list[SampleRow]:
            try:
                image_BCHH, label_B = self.scored.fetch(torch.tensor(indices), None)
            except UnfitImage as error:
                if len(indices) > 1:
                    return [row for index in indices for row in classify([index])]
                return [{**_blank_row(task, indices[0]), "missing": str(error)}]
            # The weights set device and dtype, whatever a method did to the network.
            weight = next(network.parameters())
            with torch.inference_mode():
                # Softmax in float32, because in half precision close probabilities would be equal.
                logit_BK = network(image_BCHH.to(weight)).float()
                probability_BK = logit_BK.softmax(-1).cpu()
            finite_B = logit_BK.isfinite().all(-1).cpu()
            return _sample_rows(task, indices, label_B, probability_BK, finite_B)

        network.eval()
        size = self.benchmark.batch_size
        first = MAX_AUTO_CLASSIFIED if size == "auto" else size
        batches = AdaptiveBatches(first, model.device, progress)
        keys = [request_key("image", task, index) for index in range(count)]
        with progress.phase(f"{model.name} on {task}", count):
            rows = cache.get_or_compute_batched(
                keys, range(count), [1] * count, batches, classify, progress
            )
        lost = {str(row["doc_id"]): str(row["missing"]) for row in rows if row["missing"]}
        answers = TaskAnswers(count, lost)
        if lost:
            progress.warn(f"{task}: {answers.describe()}")
        correct = [float(row[ACCURACY]) for row in rows if not row["missing"]]
        metrics, missing = settle_metrics(
            [_accuracy(self.benchmark, task, correct)], answers, self.benchmark.allow_missing
        )
        tell_results(metrics, progress)
        return ScoredBenchmark(metrics, rows, missing=missing)

    def rescore(self, rows: Sequence[SampleRow]) -> ScoredBenchmark:
        """Raise, because predicted classes have no filters or metrics that could change."""
        raise UserError(
            f"benchmark={self.benchmark.name} classifies images, whose answers cannot be scored "
            "again: choose a run on text or image-text tasks"
        )


def plan_images(benchmark: BenchmarkConfig, *, offline: bool) -> ImageHarness:
    """Find and read the images that a benchmark scores.

    Raises:
        MissingData: the folder is not given or does not contain the data set.
        UserError: there is no data set of this name, or it has no held-out images.
    """
    config = benchmark.images
    splits = image_catalogue.load_image_set(
        config.data, config.folder, download=config.download and not offline, size=config.size
    )
    if config.split == "validation":
        # The held-out part of the training set replaces the test set, so that hyperparameters are
        # never chosen on test images.
        splits = splits.for_selection()
    scored = splits.test
    if benchmark.limit is not None:
        scored = image_sets.Subset(scored, range(number_within(benchmark.limit, len(scored))))
    return ImageHarness(benchmark, splits, scored, _sources(splits, scored))


def _sources(splits: Splits, scored: ImageSet) -> dict[str, DocumentSource]:
    """Describe the scored images, and the images on which methods train."""
    origin: Origin = "embedded" if splits.name == "digits" else "file"
    # The training images are part of the run's identity, because methods may train on them.
    parts = {splits.name: scored, f"{splits.name} train": splits.train}
    return {
        name: DocumentSource(
            origin,
            splits.provenance + (f" {part.unread}" if part.unread else ""),
            None,
            part.fingerprint(),
        )
        for name, part in parts.items()
    }


def _sample_rows(
    task: str,
    indices: Sequence[int],
    label_B: Tensor,
    probability_BK: Tensor,
    finite_B: Tensor,
) -> list[SampleRow]:
    """Return one row per image, with the probability of the predicted class."""
    highest_B, predicted_B = probability_BK.max(-1)
    correct_B = (predicted_B == label_B).double()
    columns = (label_B.tolist(), predicted_B.tolist(), highest_B.tolist(), correct_B.tolist())
    rows = [
        {
            **_blank_row(task, index),
            "target": str(label),
            "prediction": str(predicted),
            "probability": probability,
            ACCURACY: correct,
        }
        for index, label, predicted, probability, correct in zip(indices, *columns, strict=True)
    ]
    blank = {"prediction": None, "probability": None, ACCURACY: None, "missing": NON_FINITE_LOGITS}
    return [
        row if finite else {**row, **blank}
        for row, finite in zip(rows, finite_B.tolist(), strict=True)
    ]


def _blank_row(task: str, index: int) -> SampleRow:
    unknown = dict.fromkeys(("target", "prediction", "probability", ACCURACY, "missing"))
    return {"task": task, "doc_id": index, **unknown}


def _picture(image_CHH: Tensor) -> Image:
    """Convert normalized values into a picture; the smallest is black, the largest is white."""
    from PIL import Image

    low, high = image_CHH.aminmax()
    byte_CHH = ((image_CHH - low) * (255 / (high - low).clamp_min(1e-12))).round().byte().cpu()
    # If the channels are not RGB, the first one is shown.
    values = byte_CHH.movedim(0, -1) if len(byte_CHH) == 3 else byte_CHH[0]
    return Image.fromarray(values.numpy())


def _accuracy(benchmark: BenchmarkConfig, task: str, correct: list[float]) -> Metric:
    n = len(correct)
    share = sum(correct) / n if n else None
    # The standard error of a Bernoulli mean, with n - 1 in its denominator as in lm-eval.
    error = math.sqrt(share * (1 - share) / (n - 1)) if share is not None and n > 1 else None
    split = benchmark.images.split
    return task_metric(benchmark, task, ACCURACY, share, split=split, n=n, stderr=error)
