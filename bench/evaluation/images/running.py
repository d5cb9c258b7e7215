"""Top-1 accuracy of a classifier.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.evaluation.batches import Batches
from bench.evaluation.memory import Memory, key
from bench.evaluation.result import Metric
from bench.evaluation.scoring import Rows, Scores
from bench.models.model import Model
from bench.models.vision import Classifier
from bench.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.evaluation.images.planning import ImageScoring

METRIC = "acc"


def score(model: Model, scoring: ImageScoring, progress: Progress, memory: Memory) -> Scores:
    """Return the accuracy and one row per image.

    Raises:
        UserError: the network is built for images of a different shape or classes.
    """
    network = model.network
    assert isinstance(network, Classifier)
    network.config.refuse_other_images(scoring.splits.name, scoring.splits.shape)
    count = len(scoring.scored)

    def work(places: Sequence[int]) -> Rows:
        image_BCHH, label_B = scoring.scored.fetch(torch.tensor(places), None)
        # The weights set device and dtype, whatever a method did to the network.
        weight = next(network.parameters())
        with torch.inference_mode():
            # Softmax in float32: in half precision, the probabilities of close classes would round
            # to a tie.
            probability_BK = network(image_BCHH.to(weight)).float().softmax(-1).cpu()
        return _rows(scoring.splits.name, places, label_B, probability_BK)

    network.eval()
    batches = Batches(scoring.benchmark.batch_size, model.device, progress)
    keys = [key("image", scoring.splits.name, place) for place in range(count)]
    with progress.phase(f"{model.name} on {scoring.splits.name}", count):
        rows = memory.batched(keys, range(count), [1] * count, batches, work, progress)
    return Scores([_accuracy(scoring, [row[METRIC] for row in rows])], rows)


def _rows(task: str, places: Sequence[int], label_B: Tensor, probability_BK: Tensor) -> Rows:
    """Return one row per image; `probability` is that of the predicted class."""
    highest_B, predicted_B = probability_BK.max(-1)
    right_B = (predicted_B == label_B).double()
    columns = (places, label_B.tolist(), predicted_B.tolist(), highest_B.tolist(), right_B.tolist())
    rows: list[dict[str, Any]] = []
    for place, label, predicted, probability, right in zip(*columns, strict=True):
        answer = {"prediction": str(predicted), "probability": probability, METRIC: right}
        rows.append({"task": task, "doc_id": place, "target": str(label), **answer})
    return rows


def _accuracy(scoring: ImageScoring, right: list[float]) -> Metric:
    """Return the accuracy with the standard error of a Bernoulli mean, n - 1 in its denominator."""
    count, share = len(right), sum(right) / len(right)
    return Metric(
        benchmark=scoring.benchmark.name,
        task=scoring.splits.name,
        metric=METRIC,
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
