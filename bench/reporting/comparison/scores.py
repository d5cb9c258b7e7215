"""A metric of one run as a function of means over the units that it scored.

Every headline here is one: an accuracy is a mean over samples, POPE's is the mean of three splits'
means, MME's sums means over categories, a perplexity is the exponential of a mean loss. Which of
these a number is, is not taken on trust: a form is accepted only if it gives the record's own
value again.

Shapes: S strata, `...` any number of resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.records import MetricPart
from bench.reporting.statistics.resampling import Floats

MME_MAXIMUM = 200.0
"""Points of a category of MME: 100 for the answers, 100 for images with both answers right."""


@dataclass(frozen=True)
class Scores:
    """Units with their scores, and what makes the metric's value of their means.

    `units` has the columns `unit` (its name), `stratum` and `score`. The value is `scale` times
    the mean over strata of the mean over units; with `exponential`, e to the power of that.
    """

    units: pd.DataFrame
    scale: float = 1.0
    exponential: bool = False

    def value(self, means_S: Floats) -> Floats:
        """Return the metric, [...], of the strata's means, [..., S]."""
        value: Floats = self.scale * means_S.mean(axis=-1)
        return np.exp(value) if self.exponential else value

    @property
    def observed(self) -> float:
        """The metric of the units as they are."""
        means_S = self.units.groupby("stratum")["score"].mean().to_numpy()
        return float(self.value(means_S))

    @property
    def binary(self) -> bool:
        """Whether every unit is right or wrong and counts alike, so that right ones are counted."""
        sizes = self.units["stratum"].value_counts()
        return bool(self.units["score"].isin([0.0, 1.0]).all()) and sizes.nunique() == 1


Form = Callable[[pd.DataFrame, str], Iterator[Scores]]


def scores(samples: pd.DataFrame, metric: MetricPart) -> Scores | None:
    """Return the units behind a number, or None when the samples do not give it again."""
    rows = rows_of(samples, metric)
    if rows.empty or metric.value is None:
        return None
    for form in FORMS:
        for found in form(rows, metric.metric):
            whole = not found.units.empty and not found.units["unit"].duplicated().any()
            if whole and math.isclose(found.observed, metric.value, rel_tol=1e-6, abs_tol=1e-9):
                return found
    return None


def rows_of(samples: pd.DataFrame, metric: MetricPart) -> pd.DataFrame:
    """Return the samples of a task, or of the members of a group, seen through one filter."""
    filters = samples["filter"].astype(object).where(samples["filter"].notna(), "none")
    seen = samples[filters == metric.filter]
    own = seen["task"] == metric.task
    members = seen["task"].str.startswith(f"{metric.task}_")
    return seen[own] if own.any() else seen[members]


def _table(unit: pd.Series[Any], stratum: Any, score: pd.Series[Any]) -> pd.DataFrame:
    table = pd.DataFrame({"unit": unit.astype(str), "stratum": stratum, "score": score})
    return table.dropna().astype({"score": float, "stratum": str})


def _names(rows: pd.DataFrame) -> pd.Series[Any]:
    return rows["task"] + "/" + rows["doc_id"].astype(str)


def _means(rows: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """A score per sample: its mean, or for a group of tasks the mean of their means."""
    if metric in rows:
        yield Scores(_table(_names(rows), "all", rows[metric]))
        yield Scores(_table(_names(rows), rows["task"], rows[metric]))


def _perplexity(rows: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """The mean token loss of every window."""
    if metric == "perplexity":
        loss = -rows["loglikelihoods"].str[0].astype(float) / rows["n_tokens"].astype(float)
        yield Scores(_table(_names(rows), "all", loss), exponential=True)


def _mean_of_categories(rows: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """POPE: the mean of its splits' accuracies."""
    single = metric.removesuffix("_mean")
    if single != metric and {single, "category"} <= set(rows):
        yield Scores(_table(_names(rows), rows["category"], rows[single]))


def _mme(rows: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """MME: an image's points are the mean of both answers and of both being right."""
    part, _, kind = metric.rpartition("_")
    single = f"{part}_score"
    if kind not in ("score", "share") or not {single, "category", "unit"} <= set(rows):
        return
    images = rows.dropna(subset=[single]).astype({single: float}).groupby(["category", "unit"])
    points = 100 * images[single].mean() + 100 * (images[single].min() == 1)
    table = points.rename("score").reset_index().rename(columns={"category": "stratum"})
    categories = float(table["stratum"].nunique())
    yield Scores(table, scale=categories if kind == "score" else 1 / MME_MAXIMUM)


def _mmbench(rows: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """MMBench: a question is right if the option is named in all rotations of the options."""
    scale = {"mmbench_accuracy": 1.0, "gpt_eval_score": 100.0}.get(metric)
    if scale is not None and "unit" in rows:
        right = rows["response"].str.strip().str[:1] == rows["target"]
        all_right = right.groupby(rows["unit"]).min().astype(float)
        table = all_right.rename("score").rename_axis("unit").reset_index()
        yield Scores(table.assign(stratum="all"), scale=scale)


FORMS: tuple[Form, ...] = (_means, _perplexity, _mean_of_categories, _mme, _mmbench)
