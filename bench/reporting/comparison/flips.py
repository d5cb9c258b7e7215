"""Flips: samples on which two runs score differently, with the question and both answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.records import MetricPart
from bench.reporting.comparison.comparing import Run
from bench.reporting.comparison.scores import rows_of

PER_CHARACTER = "acc_norm"
"""lm-eval's metric that divides the log-likelihood of a choice by its length in characters."""


@dataclass(frozen=True)
class Flip:
    """One sample whose score differs between the candidate and the baseline.

    `image` is the SHA-256 of the sample's image, if any; `source` locates the data set of the
    document.
    """

    run: str
    task: str
    document: int
    source: str | None
    image: str | None
    prompt: str | None
    target: str | None
    baseline_said: str | None
    candidate_said: str | None
    baseline_score: float
    candidate_score: float

    @property
    def lost(self) -> bool:
        """Whether the candidate scores lower."""
        return self.candidate_score < self.baseline_score


def flips(baseline: Run, candidate: Run, metric: MetricPart, limit: int) -> list[Flip]:
    """Return up to `limit` samples that the candidate lost, and as many that it gained.

    The largest changes come first. A metric without a score per sample has no flips.
    """
    mine, its = (_scored(run.samples, metric) for run in (baseline, candidate))
    if mine is None or its is None or not mine.index.equals(its.index):
        return []
    change = its["score"] - mine["score"]
    # A stable sort keeps equal changes in document order, so that the choice is reproducible; for
    # accuracies all changes are equal.
    order = change.abs().sort_values(ascending=False, kind="stable").index
    lost = [place for place in order if change[place] < 0][:limit]
    gained = [place for place in order if change[place] > 0][:limit]
    source = (baseline.record.provenance.get("data", {}).get(metric.task) or {}).get("location")
    shown = ((mine.loc[place], its.loc[place]) for place in lost + gained)
    return [_flip(candidate.record.id, metric, source, *rows) for rows in shown]


def _scored(samples: pd.DataFrame, metric: MetricPart) -> pd.DataFrame | None:
    """Return a metric's samples by task and document with their `score`, if each has one."""
    rows = rows_of(samples, metric)
    # `X_mean` (POPE's mean over splits) is computed from the per-answer scores of `X`.
    single = metric.metric.removesuffix("_mean")
    # A document with several rows has no single score that could flip.
    if single not in rows or rows.duplicated(["task", "doc_id"]).any():
        return None
    scored = rows.assign(score=rows[single].astype(float)).dropna(subset=["score"])
    return scored.set_index(["task", "doc_id"], drop=False).sort_index()


def _flip(
    run: str, metric: MetricPart, source: str | None, mine: pd.Series[Any], its: pd.Series[Any]
) -> Flip:
    return Flip(
        run=run,
        task=str(mine["task"]),
        document=int(mine["doc_id"]),
        source=source,
        image=_text(mine, "image_hash"),
        prompt=_text(mine, "prompt"),
        target=_target(mine),
        baseline_said=_said(mine, metric.metric),
        candidate_said=_said(its, metric.metric),
        baseline_score=float(mine["score"]),
        candidate_score=float(its["score"]),
    )


def _text(row: pd.Series[Any], column: str) -> str | None:
    value = row.get(column)
    return value if isinstance(value, str) else None


def _target(row: pd.Series[Any]) -> str | None:
    """Return the correct answer; if the target is the index of a choice, return that choice."""
    target, choices = _text(row, "target"), list(row["choices"])
    # lm-eval stores the index as text. A number that is no index of a choice is the answer itself.
    if choices and target is not None and target.isdecimal() and int(target) < len(choices):
        return str(choices[int(target)])
    return target


def _said(row: pd.Series[Any], metric: str) -> str | None:
    """Return the choice with the highest log-likelihood, or the generated text or class."""
    choices = [str(choice) for choice in row["choices"]]
    likelihood_C = np.asarray(row["loglikelihoods"], dtype=float)
    if choices and len(choices) == len(likelihood_C):
        if metric == PER_CHARACTER:
            likelihood_C = likelihood_C / [max(len(choice), 1) for choice in choices]
        return choices[int(likelihood_C.argmax())]
    return _text(row, "response") or _text(row, "prediction")
