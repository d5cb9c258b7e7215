"""Metrics of a run as functions of means over scored units.

Every headline metric has this form: an accuracy is a mean over samples, POPE's is the mean of three
splits' means, MME's sums means over categories, a perplexity is the exponential of a mean loss. A
form is accepted for a number only if it reproduces the value in the record.

Shapes: S strata, `...` any number of resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.records import Metric
from bench.reporting.statistics import Floats

if TYPE_CHECKING:
    Column = pd.Series[Any]

MAX_MME_POINTS = 200.0
"""Points of an MME category: 100 for the answers, 100 for images with both answers correct."""


@dataclass(frozen=True)
class UnitScores:
    """Scored units, and how the metric's value follows from their means.

    `units` has the columns `unit` (its name), `stratum` and `score`. The value is `scale` times the
    mean over strata of the mean over units, and the exponential of that if `exponential`.
    """

    units: pd.DataFrame
    scale: float = 1.0
    exponential: bool = False

    def value(self, means_S: Floats) -> Floats:
        """Return the metric, [...], from the means of the strata, [..., S]."""
        value: Floats = self.scale * means_S.mean(axis=-1)
        return np.exp(value) if self.exponential else value

    @property
    def observed(self) -> float:
        """Value of the metric without resampling."""
        means_S = self.units.groupby("stratum")["score"].mean().to_numpy()
        return float(self.value(means_S))

    @property
    def binary(self) -> bool:
        """Whether every unit is right or wrong with equal weight, so that flips can be counted."""
        # In strata of different sizes, units have different weights in the mean of means, so
        # McNemar's count of flips would test another hypothesis than the reported difference.
        sizes = self.units["stratum"].value_counts()
        return bool(self.units["score"].isin([0.0, 1.0]).all()) and sizes.nunique() == 1


MetricForm = Callable[[pd.DataFrame, str], Iterator[UnitScores]]


def unit_scores(samples: pd.DataFrame, metric: Metric) -> UnitScores | None:
    """Return the units of a number, or None if the samples do not reproduce it."""
    rows = metric_rows(samples, metric)
    if "missing" in rows:
        # Samples without an answer have no score, although a form might compute one from the
        # response.
        rows = rows[rows["missing"].isna()]
    if rows.empty or metric.value is None:
        return None
    for form in METRIC_FORMS:
        for found in form(rows, metric.metric):
            # A repeated unit means that the form grouped the samples incorrectly, even if the value
            # happens to match.
            whole = not found.units.empty and not found.units["unit"].duplicated().any()
            if whole and math.isclose(found.observed, metric.value, rel_tol=1e-6, abs_tol=1e-9):
                return found
    return None


def metric_rows(samples: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the samples of a task, or of the members of a task group, with one filter."""
    # Image classifiers have no filter, which is NaN in a frame and "none" in their metrics.
    named = samples.get("filter", pd.Series(None, samples.index, dtype=object)).astype(object)
    filters = named.where(named.notna(), "none")
    seen = samples[filters == metric.filter]
    own = seen["task"] == metric.task
    # lm-eval names members after their group (`mmlu_anatomy`). An unrelated task with this prefix
    # would be detected by `unit_scores`, which must reproduce the value.
    members = seen["task"].str.startswith(f"{metric.task}_")
    return seen[own] if own.any() else seen[members]


def _unit_table(unit: Column, stratum: Column | str, score: Column) -> pd.DataFrame:
    table = pd.DataFrame({"unit": unit.astype(str), "stratum": stratum, "score": score})
    return table.dropna().astype({"score": float, "stratum": str})


def _unit_names(rows: pd.DataFrame) -> Column:
    return rows["task"] + "/" + rows["doc_id"].astype(str)


def _means(rows: pd.DataFrame, metric: str) -> Iterator[UnitScores]:
    """Yield the mean over samples, then, for a task group, the mean of the tasks' means."""
    if metric in rows:
        # Groups may or may not weight members by size; the value in the record decides.
        yield UnitScores(_unit_table(_unit_names(rows), "all", rows[metric]))
        yield UnitScores(_unit_table(_unit_names(rows), rows["task"], rows[metric]))


def _perplexity(rows: pd.DataFrame, metric: str) -> Iterator[UnitScores]:
    """Yield the mean token loss of every window."""
    if metric == "perplexity" and {"loglikelihoods", "n_tokens"} <= set(rows):
        # The windows are the units: the recorded perplexity is the exponential of the mean over
        # windows of their mean token losses, whatever their lengths.
        loss = -rows["loglikelihoods"].str[0].astype(float) / rows["n_tokens"].astype(float)
        yield UnitScores(_unit_table(_unit_names(rows), "all", loss), exponential=True)


def _mean_of_categories(rows: pd.DataFrame, metric: str) -> Iterator[UnitScores]:
    """Yield POPE's form: the mean of its splits' accuracies."""
    single = metric.removesuffix("_mean")
    if single != metric and {single, "category"} <= set(rows):
        yield UnitScores(_unit_table(_unit_names(rows), rows["category"], rows[single]))


def _mme(rows: pd.DataFrame, metric: str) -> Iterator[UnitScores]:
    """Yield MME's form: points per image from both answers and from both being correct."""
    part, _, kind = metric.rpartition("_")
    single = f"{part}_score"
    if kind not in ("score", "share") or not {single, "category", "unit"} <= set(rows):
        return
    images = rows.dropna(subset=[single]).astype({single: float}).groupby(["category", "unit"])
    # MME asks two questions per image. A category scores 100 × (accuracy + accuracy+), where
    # accuracy+ is the share of images with both answers right (Fu et al., arXiv 2306.13394).
    points = 100 * images[single].mean() + 100 * (images[single].min() == 1)
    table = points.rename("score").reset_index().rename(columns={"category": "stratum"})
    # The metric sums over categories, while `UnitScores.value` averages, so it is scaled.
    categories = float(table["stratum"].nunique())
    yield UnitScores(table, scale=categories if kind == "score" else 1 / MAX_MME_POINTS)


def _mmbench(rows: pd.DataFrame, metric: str) -> Iterator[UnitScores]:
    """Yield MMBench's form: a question counts if it is answered right in all option rotations."""
    scale = {"mmbench_accuracy": 1.0, "gpt_eval_score": 100.0}.get(metric)
    if scale is not None and {"unit", "response", "target"} <= set(rows):
        right = rows["response"].str.strip().str[:1] == rows["target"]
        # CircularEval of MMBench (Liu et al., arXiv 2307.06281).
        all_right = right.groupby(rows["unit"]).min().astype(float)
        table = all_right.rename("score").rename_axis("unit").reset_index()
        yield UnitScores(table.assign(stratum="all"), scale=scale)


METRIC_FORMS: tuple[MetricForm, ...] = (_means, _perplexity, _mean_of_categories, _mme, _mmbench)
