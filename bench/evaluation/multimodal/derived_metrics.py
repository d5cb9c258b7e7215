"""Published metrics that lmms-eval does not return, computed from its scored samples.

POPE: the accuracy on each of its three splits, and their mean. MME: the score of each category, and
the perception sum as a share of its maximum, 200 per category. MMBench: the harness's percentage as
a share; a question counts as correct if it is answered correctly in all rotations of its options
(CircularEval).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from bench.evaluation.metrics import LoggedSample

HarnessScores: TypeAlias = Mapping[str, float | str]
"""The aggregated scores of a task, by `METRIC,FILTER`."""
MME_MAXIMUM = 200.0
ROTATION_STRIDE = 1_000_000
"""Difference of the indices of a question and its next rotation in MMBench."""
ALWAYS_DERIVED = {
    "pope_accuracy": ("pope_accuracy_mean",),
    "mme_perception_score": ("mme_perception_share",),
    "gpt_eval_score": ("mmbench_accuracy",),
}
"""Metrics of lmms-eval, and those that can be derived from them for any samples."""


class DerivedMetric(NamedTuple):
    """One number, its standard error, and the number of items in its mean."""

    metric: str
    value: float
    stderr: float | None
    n: int


def always_derived_from(metrics: Iterable[str]) -> list[str]:
    """Return the names of the metrics that are always derived from the given ones."""
    return [name for metric in metrics for name in ALWAYS_DERIVED.get(metric, ())]


def derive_metrics(samples: Sequence[LoggedSample], scores: HarnessScores) -> list[DerivedMetric]:
    """Return every metric that can be derived from the samples of one task and its scores."""
    return [*_pope(samples), *_mme(samples), *_mmbench(samples, scores)]


def _pope(samples: Sequence[LoggedSample]) -> list[DerivedMetric]:
    by_split: dict[str, list[float]] = defaultdict(list)
    for sample in _samples_with("pope_accuracy", samples):
        by_split[sample["doc"]["category"]].append(sample["pope_accuracy"]["score"])
    splits = [
        DerivedMetric(f"pope_accuracy_{name}", *_mean(scores), len(scores))
        for name, scores in sorted(by_split.items())
    ]
    if not splits:
        return []
    # The mean of splits instead of samples, as in papers. Its error treats the splits as
    # independent.
    value = statistics.fmean(split.value for split in splits)
    mean = DerivedMetric("pope_accuracy_mean", value, _mean_error(splits), sum(s.n for s in splits))
    return [mean, *splits]


def _mme(samples: Sequence[LoggedSample]) -> list[DerivedMetric]:
    metrics: list[DerivedMetric] = []
    for part in ("perception", "cognition"):
        categories = _mme_categories(
            _samples_with(f"mme_{part}_score", samples), f"mme_{part}_score"
        )
        if not categories:
            continue
        share = statistics.fmean(category.value for category in categories) / MME_MAXIMUM
        error = _mean_error(categories)
        n = sum(category.n for category in categories)
        scaled = None if error is None else error / MME_MAXIMUM
        metrics += [DerivedMetric(f"mme_{part}_share", share, scaled, n), *categories]
    return metrics


def _mme_categories(samples: Sequence[LoggedSample], metric: str) -> list[DerivedMetric]:
    """Score each category: the mean over images of accuracy and of both answers correct."""
    # MME asks two questions per image. The paper's score of a category is accuracy plus accuracy+,
    # the share of images with both answers correct, each in percent: at most 200.
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        result = sample[metric]
        images[result["category"]][result["question_id"]].append(result["score"])
    metrics = []
    for category, scores in sorted(images.items()):
        points = [100 * statistics.fmean(pair) + 100 * (min(pair) == 1) for pair in scores.values()]
        metrics.append(DerivedMetric(f"mme_{category}", *_mean(points), len(points)))
    return metrics


def _mmbench(samples: Sequence[LoggedSample], scores: HarnessScores) -> list[DerivedMetric]:
    """Return the harness's percentage as a share of questions, each with all its rotations.

    For a mean of zeros and ones, the standard error follows from the mean alone.
    """
    scored = _samples_with("gpt_eval_score", samples)
    if not scored:
        return []
    # Rotations of a question differ in the index by multiples of a million.
    n = len({sample["doc"]["index"] % ROTATION_STRIDE for sample in scored})
    share = float(scores["gpt_eval_score,none"]) / 100
    error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return [DerivedMetric("mmbench_accuracy", share, error, n)]


def _samples_with(metric: str, samples: Sequence[LoggedSample]) -> list[LoggedSample]:
    return [sample for sample in samples if isinstance(sample.get(metric), dict)]


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _mean_error(parts: Sequence[DerivedMetric]) -> float | None:
    """Return the standard error of the unweighted mean of independent parts."""
    errors = [part.stderr for part in parts if part.stderr is not None]
    return math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
