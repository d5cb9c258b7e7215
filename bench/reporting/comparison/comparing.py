"""Comparing runs: which is the baseline, which numbers go together, what the family of tests is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from bench.errors import UserError
from bench.evaluation.average import AVERAGE, averaged
from bench.records import MetricPart, Record
from bench.reporting.comparison.contrast import Contrast, contrast, unpaired
from bench.reporting.comparison.identity import mismatch, unlike_samples
from bench.reporting.comparison.pairing import Paired, mean_of, pair
from bench.reporting.comparison.scores import scores
from bench.reporting.statistics import holm

SEED = 0
"""The same runs give the same intervals."""


@dataclass(frozen=True)
class Run:
    """A record with its samples, one row for each."""

    record: Record
    samples: pd.DataFrame


@dataclass(frozen=True)
class Comparison:
    """Candidates against one baseline; `refused` says, one sentence each, what was not paired."""

    baseline: Record
    candidates: tuple[Record, ...]
    contrasts: tuple[Contrast, ...]
    refused: tuple[str, ...]


def baseline_of(records: Sequence[Record]) -> Record:
    """Return the one dense run among several.

    Raises:
        UserError: none of them is dense, or more than one is.
    """
    dense = [record for record in records if not record.methods]
    if len(dense) == 1:
        return dense[0]
    found = "none of the runs is" if not dense else f"{len(dense)} of the runs are"
    ids = ", ".join(record.id[:8] for record in dense or records)
    raise UserError(f"{found} dense: say with --baseline which to compare with, one of {ids}")


def compare(baseline: Run, candidates: Sequence[Run]) -> Comparison:
    """Compare every candidate with the baseline, task by task and on average.

    Raises:
        UserError: not one number of any candidate may be compared.
    """
    contrasts: list[Contrast] = []
    refused: list[str] = []
    for candidate in candidates:
        one = _OnePair(baseline, candidate)
        contrasts += one.contrasts()
        refused += one.refused
    if not contrasts:
        reason = refused[0] if refused else "the runs have no task in common"
        raise UserError(f"nothing to compare: {reason}")
    corrected = _corrected(_corrected(contrasts, average=True), average=False)
    records = tuple(candidate.record for candidate in candidates)
    return Comparison(baseline.record, records, tuple(corrected), tuple(dict.fromkeys(refused)))


def _corrected(contrasts: list[Contrast], *, average: bool) -> list[Contrast]:
    """Correct one family of tests: the averages, or everything else."""
    family = [c for c in contrasts if c.p is not None and (c.task == AVERAGE) == average]
    adjusted = holm([c.p for c in family if c.p is not None])
    by_place = dict(zip(map(id, family), adjusted, strict=True))
    return [replace(c, p_holm=by_place[id(c)]) if id(c) in by_place else c for c in contrasts]


class _OnePair:
    """A baseline and one candidate; resamples of different tasks are independent."""

    def __init__(self, baseline: Run, candidate: Run) -> None:
        self.baseline, self.candidate = baseline, candidate
        self.refused: list[str] = []
        self._generator = np.random.default_rng(SEED)
        self._paired: dict[tuple[str, str], Paired | None] = {}

    def contrasts(self) -> list[Contrast]:
        """Return the average, where both runs have one, and every task that both scored."""
        ours, theirs = self.baseline.record, self.candidate.record
        tasks = [
            (mine, its)
            for mine in ours.metrics
            if mine.headline and mine.task != AVERAGE
            if (its := theirs.metric(mine.task)) is not None
        ]
        found = [made for mine, its in tasks if (made := self._task(mine, its)) is not None]
        return [*self._average(), *found]

    def _task(self, mine: MetricPart, its: MetricPart) -> Contrast | None:
        """Contrast one headline; None where the identities differ or a value is no number."""
        if not self._same(mine, its):
            return None
        paired = self._pair(mine, its)
        run = self.candidate.record.id
        if paired is not None:
            return contrast(run, mine, paired)
        assert mine.value is not None and its.value is not None
        return unpaired(run, mine, mine.value, its.value)

    def _same(self, mine: MetricPart, its: MetricPart) -> bool:
        """Whether two numbers may be subtracted; if not, keep the reason."""
        ours, theirs = self.baseline, self.candidate
        reason = mismatch((ours.record, mine), (theirs.record, its))
        reason = reason or unlike_samples(ours.samples, theirs.samples, mine)
        for record, row in ((ours.record, mine), (theirs.record, its)):
            if reason is None and (row.value is None or not math.isfinite(row.value)):
                reason = f"{row.task} is not compared: it is no number in run {record.id[:8]}"
        self.refused += [reason] if reason else []
        return reason is None

    def _pair(self, mine: MetricPart, its: MetricPart) -> Paired | None:
        """Pair two numbers of one identity once; None where samples do not give them again."""
        key = (mine.task, mine.metric)
        if key not in self._paired:
            ours = scores(self.baseline.samples, mine)
            theirs = scores(self.candidate.samples, its)
            self._paired[key] = (
                None if ours is None or theirs is None else pair(ours, theirs, self._generator)
            )
        return self._paired[key]

    def _average(self) -> list[Contrast]:
        """Contrast the averages by the benchmark's own rule, if both are means of the same."""
        ours, theirs = self.baseline.record, self.candidate.record
        mine, its = ours.metric(AVERAGE), theirs.metric(AVERAGE)
        if mine is None or its is None or mine.value is None or its.value is None:
            return []
        rows, others = _averaged(ours), _averaged(theirs)
        if [_name(row) for row in rows] != [_name(row) for row in others]:
            self.refused.append("average is not compared: it is a mean over different tasks")
            return []
        both = list(zip(rows, others, strict=True))
        if not all(self._same(row, other) for row, other in both):
            self.refused.append("average is not compared: one of its tasks is not")
            return []
        parts = [self._pair(row, other) for row, other in both]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return [unpaired(theirs.id, mine, mine.value, its.value)]
        return [contrast(theirs.id, mine, mean_of(whole))]


def _averaged(record: Record) -> list[MetricPart]:
    return averaged(record.metrics, record.config["benchmark"].get("perplexity", {}))


def _name(metric: MetricPart) -> tuple[str, str]:
    return metric.task, metric.metric
