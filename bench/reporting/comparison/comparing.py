"""Compare runs: choice of the baseline, pairs of numbers, and families of tests."""

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
"""Fixed, so that the same runs always give the same intervals."""


@dataclass(frozen=True)
class Run:
    """A record with its samples, one row per sample."""

    record: Record
    samples: pd.DataFrame


@dataclass(frozen=True)
class Comparison:
    """Candidates against one baseline; `refused` states, one sentence each, what was not paired."""

    baseline: Record
    candidates: tuple[Record, ...]
    contrasts: tuple[Contrast, ...]
    refused: tuple[str, ...]


def baseline_of(records: Sequence[Record]) -> Record:
    """Return the only dense run among several.

    Raises:
        UserError: no run is dense, or more than one is.
    """
    dense = [record for record in records if not record.methods]
    if len(dense) == 1:
        return dense[0]
    found = "none of the runs is" if not dense else f"{len(dense)} of the runs are"
    ids = ", ".join(record.id[:8] for record in dense or records)
    raise UserError(f"{found} dense: choose the baseline with --baseline, one of {ids}")


def compare(baseline: Run, candidates: Sequence[Run]) -> Comparison:
    """Compare every candidate with the baseline, per task and on average.

    Raises:
        UserError: not a single number of any candidate can be compared.
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
    # Averages are a family of their own: they are computed from the samples of the tasks, and would
    # make the correction of every task harsher without adding evidence.
    corrected = _corrected(_corrected(contrasts, average=True), average=False)
    records = tuple(candidate.record for candidate in candidates)
    return Comparison(baseline.record, records, tuple(corrected), tuple(dict.fromkeys(refused)))


def _corrected(contrasts: list[Contrast], *, average: bool) -> list[Contrast]:
    """Apply Holm's correction to one family of tests: the averages, or everything else."""
    family = [c for c in contrasts if c.p is not None and (c.task == AVERAGE) == average]
    adjusted = holm([c.p for c in family if c.p is not None])
    # By object identity: two contrasts with equal fields are still two tests, and `replace` below
    # needs to find each of them again.
    by_place = dict(zip(map(id, family), adjusted, strict=True))
    return [replace(c, p_holm=by_place[id(c)]) if id(c) in by_place else c for c in contrasts]


class _OnePair:
    """A baseline and one candidate; different tasks are resampled independently."""

    def __init__(self, baseline: Run, candidate: Run) -> None:
        self.baseline, self.candidate = baseline, candidate
        self.refused: list[str] = []
        # A generator per candidate: naming one more leaves the intervals of the others as they are.
        self._generator = np.random.default_rng(SEED)
        self._paired: dict[tuple[str, str], Paired | None] = {}

    def contrasts(self) -> list[Contrast]:
        """Return the average, if both runs have one, and every task that both scored."""
        ours, theirs = self.baseline.record, self.candidate.record
        tasks = [
            (mine, its)
            for mine in ours.metrics
            if mine.headline and mine.task != AVERAGE
            if (its := theirs.metric(mine.task)) is not None
        ]
        # Tasks before the average, whose draws reuse those of its tasks.
        found = [made for mine, its in tasks if (made := self._task(mine, its)) is not None]
        return [*self._average(), *found]

    def _task(self, mine: MetricPart, its: MetricPart) -> Contrast | None:
        """Contrast one headline metric; None if the two numbers may not be subtracted."""
        if not self._same(mine, its):
            return None
        paired = self._pair(mine, its)
        run = self.candidate.record.id
        if paired is not None:
            return contrast(run, mine, paired)
        # `_same` has refused values that are missing or not finite.
        assert mine.value is not None and its.value is not None
        return unpaired(run, mine, mine.value, its.value)

    def _same(self, mine: MetricPart, its: MetricPart) -> bool:
        """Whether two numbers may be subtracted; if not, record the reason."""
        ours, theirs = self.baseline, self.candidate
        reason = mismatch((ours.record, mine), (theirs.record, its))
        reason = reason or unlike_samples(ours.samples, theirs.samples, mine)
        for record, row in ((ours.record, mine), (theirs.record, its)):
            if reason is None and (row.value is None or not math.isfinite(row.value)):
                reason = f"{row.task} is not compared: run {record.id[:8]} has no finite value"
        self.refused += [reason] if reason else []
        return reason is None

    def _pair(self, mine: MetricPart, its: MetricPart) -> Paired | None:
        """Pair two numbers of one identity; None if the samples do not reproduce them."""
        key = (mine.task, mine.metric)
        # Cached: the average must use the very resamples that its tasks were reported with, and
        # drawing again would advance the generator.
        if key not in self._paired:
            ours = scores(self.baseline.samples, mine)
            theirs = scores(self.candidate.samples, its)
            self._paired[key] = (
                None if ours is None or theirs is None else pair(ours, theirs, self._generator)
            )
        return self._paired[key]

    def _average(self) -> list[Contrast]:
        """Contrast the averages by the benchmark's own rule, if both average the same metrics."""
        ours, theirs = self.baseline.record, self.candidate.record
        mine, its = ours.metric(AVERAGE), theirs.metric(AVERAGE)
        if mine is None or its is None or mine.value is None or its.value is None:
            return []
        rows, others = _averaged(ours), _averaged(theirs)
        if [_name(row) for row in rows] != [_name(row) for row in others]:
            self.refused.append("average is not compared: the runs average different tasks")
            return []
        both = list(zip(rows, others, strict=True))
        if not all(self._same(row, other) for row, other in both):
            self.refused.append("average is not compared: one of its tasks is not compared")
            return []
        parts = [self._pair(row, other) for row, other in both]
        whole = [part for part in parts if part is not None]
        # A task without sample scores cannot be resampled, so the mean has no interval.
        if len(whole) < len(parts):
            return [unpaired(theirs.id, mine, mine.value, its.value)]
        return [contrast(theirs.id, mine, mean_of(whole))]


def _averaged(record: Record) -> list[MetricPart]:
    return averaged(record.metrics, record.config["benchmark"].get("perplexity", {}))


def _name(metric: MetricPart) -> tuple[str, str]:
    return metric.task, metric.metric
