"""Choice of a baseline, pairing of comparable numbers, and correction for multiple tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import pandas as pd

from bench.errors import UserError
from bench.evaluation.metrics import averaged_headlines
from bench.records import Metric, Record
from bench.records.display import html_table
from bench.records.record import AVERAGE
from bench.reporting.comparison.contrast import (
    Contrast,
    PairedScores,
    mean_of_pairs,
    pair_scores,
    paired_contrast,
    unpaired_contrast,
)
from bench.reporting.comparison.metric_forms import metric_rows, unit_scores
from bench.reporting.record_numbers import metric_identity
from bench.reporting.statistics import holm
from bench.ui import clean

SEED = 0
"""Fixed, so that the same runs always give the same intervals."""


@dataclass(frozen=True)
class ComparedRun:
    """A record with its samples, one row per sample."""

    record: Record
    samples: pd.DataFrame


@dataclass(frozen=True)
class Comparison:
    """Candidates against one baseline; `refused` has one sentence per number that is not paired."""

    baseline: Record
    candidates: tuple[Record, ...]
    contrasts: tuple[Contrast, ...]
    refused: tuple[str, ...]

    def __repr__(self) -> str:
        """Return the differences as aligned text, for scripts and the Python prompt."""
        header, rows = self._cells()
        table = [[clean(cell) for cell in row] for row in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        )
        return "\n".join([*lines, *map(clean, self.refused)])

    def _repr_html_(self) -> str:
        """Return the differences as HTML, for notebooks."""
        header, rows = self._cells()
        refused = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.refused)
        return html_table(header, rows) + refused

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings of a table of the differences, and its rows."""
        labels = {record.id: record.label for record in self.candidates}
        header = ["run", "task", "metric", self.baseline.label, "candidate", "difference", "95 %",
                  "p (Holm)"]  # fmt: skip
        rows = [
            [
                labels[row.run], row.task, row.metric, f"{row.baseline:.4g}",
                f"{row.candidate:.4g}", f"{row.difference:+.4g}",
                "" if row.low is None else f"[{row.low:+.3g}, {row.high:+.3g}]",
                "" if row.p_holm is None else f"{row.p_holm:.2g}",
            ]
            for row in self.contrasts
        ]  # fmt: skip
        return header, rows


def baseline_of(records: Sequence[Record]) -> Record:
    """Return the only dense run among several.

    Raises:
        UserError: no run is dense, or more than one is.
    """
    dense = [record for record in records if record.is_dense]
    if len(dense) == 1:
        return dense[0]
    found = "none of the runs is" if not dense else f"{len(dense)} of the runs are"
    ids = ", ".join(record.id[:8] for record in dense or records)
    raise UserError(f"{found} dense: choose the baseline with --baseline, one of {ids}")


def compare(baseline: ComparedRun, candidates: Sequence[ComparedRun]) -> Comparison:
    """Compare every candidate with the baseline, per task and on average.

    Raises:
            UserError: no number of any candidate can be compared.
    """
    contrasts: list[Contrast] = []
    refused: list[str] = []
    for candidate in candidates:
        pair = _RunPair(baseline, candidate)
        contrasts += pair.contrasts()
        refused += pair.refused
    if not contrasts:
        reason = refused[0] if refused else "the runs have no task in common"
        raise UserError(f"nothing to compare: {reason}")
    # Averages are a separate family: they are computed from the samples of the tasks, and would
    # make the correction of every task stricter without adding evidence.
    corrected = _holm_corrected(_holm_corrected(contrasts, average=True), average=False)
    records = tuple(candidate.record for candidate in candidates)
    return Comparison(baseline.record, records, tuple(corrected), tuple(dict.fromkeys(refused)))


def _holm_corrected(contrasts: list[Contrast], *, average: bool) -> list[Contrast]:
    """Apply Holm's correction to one family of tests: the averages, or everything else."""
    family = [c for c in contrasts if c.p is not None and (c.task == AVERAGE) == average]
    adjusted = holm([c.p for c in family if c.p is not None])
    # By object identity, because contrasts with equal fields are still different tests, and
    # `replace` below must find each of them.
    p_by_test = dict(zip(map(id, family), adjusted, strict=True))
    return [replace(c, p_holm=p_by_test[id(c)]) if id(c) in p_by_test else c for c in contrasts]


class _RunPair:
    """A baseline and one candidate; different tasks are resampled independently."""

    def __init__(self, baseline: ComparedRun, candidate: ComparedRun) -> None:
        self.baseline, self.candidate = baseline, candidate
        self.refused: list[str] = []
        # A generator per candidate, so that another candidate does not change the intervals.
        self._generator = np.random.default_rng(SEED)
        self._paired: dict[tuple[str, str], PairedScores | None] = {}

    def contrasts(self) -> list[Contrast]:
        """Return the average, if both runs have one, and every task that both scored."""
        tasks = [
            (base, other)
            for base in self.baseline.record.metrics
            if base.headline and base.task != AVERAGE
            if (other := self.candidate.record.metric(base.task)) is not None
        ]
        self._name_unshared()
        # Tasks before the average, which reuses their draws.
        found = [c for base, other in tasks if (c := self._task(base, other)) is not None]
        return [*self._average(), *found]

    def _name_unshared(self) -> None:
        """Record the tasks that only one of the runs scored, because no row would show them."""
        records = (self.baseline.record, self.candidate.record)
        names = [
            {m.task: None for m in record.metrics if m.headline and m.task != AVERAGE}
            for record in records
        ]
        for record, own, others in zip(records, names, reversed(names), strict=True):
            alone = [task for task in own if task not in others]
            # Runs without common tasks are refused as a whole, with a message of their own.
            if alone and len(alone) < len(own):
                only = f"only run {record.id[:8]} has scored it"
                self.refused.append(f"{', '.join(alone)}: not compared, since {only}")

    def _task(self, base: Metric, other: Metric) -> Contrast | None:
        """Contrast one headline metric; return None if the numbers are not comparable."""
        if not self._same(base, other):
            return None
        paired = self._pair(base, other)
        run = self.candidate.record.id
        if paired is not None:
            return paired_contrast(run, base, paired)
        if base.missing or other.missing:
            self.refused.append(
                f"{base.task} is not compared: the runs have no answer to "
                f"{base.missing} and {other.missing} samples, and these numbers cannot be paired"
            )
            return None
        # `_same` has refused values that are missing or not finite.
        assert base.value is not None and other.value is not None
        return unpaired_contrast(run, base, base.value, other.value)

    def _same(self, base: Metric, other: Metric) -> bool:
        """Return whether two numbers are comparable; if not, record the reason."""
        baseline, candidate = self.baseline, self.candidate
        reason = identity_mismatch((baseline.record, base), (candidate.record, other))
        reason = reason or sample_mismatch(baseline.samples, candidate.samples, base)
        for record, row in ((baseline.record, base), (candidate.record, other)):
            if reason is None and (row.value is None or not math.isfinite(row.value)):
                reason = f"{row.task} is not compared: run {record.id[:8]} has no finite value"
        self.refused += [reason] if reason else []
        return reason is None

    def _pair(self, base: Metric, other: Metric) -> PairedScores | None:
        """Pair two comparable numbers; return None if the samples do not reproduce them."""
        key = (base.task, base.metric)
        # Cached, because the average must use the resamples that were reported for its tasks, and
        # drawing again would advance the generator.
        if key not in self._paired:
            baseline = unit_scores(self.baseline.samples, base)
            candidate = unit_scores(self.candidate.samples, other)
            self._paired[key] = (
                None
                if baseline is None or candidate is None
                else pair_scores(baseline, candidate, self._generator)
            )
        return self._paired[key]

    def _average(self) -> list[Contrast]:
        """Contrast the averages by the benchmark's own rule, if both are over the same metrics."""
        baseline, candidate = self.baseline.record, self.candidate.record
        base, other = baseline.metric(AVERAGE), candidate.metric(AVERAGE)
        if base is None or other is None or base.value is None or other.value is None:
            return []
        rows, others = _averaged_metrics(baseline), _averaged_metrics(candidate)
        if [_metric_key(row) for row in rows] != [_metric_key(row) for row in others]:
            self.refused.append("average is not compared: the runs average different tasks")
            return []
        both = list(zip(rows, others, strict=True))
        if not all(self._same(row, other) for row, other in both):
            self.refused.append("average is not compared: one of its tasks is not compared")
            return []
        parts = [self._pair(row, other) for row, other in both]
        available = [part for part in parts if part is not None]
        if len(available) < len(parts) and (base.missing or other.missing):
            return []
        # A task without scores per sample cannot be resampled, so the mean has no interval.
        if len(available) < len(parts):
            return [unpaired_contrast(candidate.id, base, base.value, other.value)]
        return [paired_contrast(candidate.id, base, mean_of_pairs(available))]


def _averaged_metrics(record: Record) -> list[Metric]:
    return averaged_headlines(record.metrics, record.config["benchmark"].get("perplexity", {}))


def _metric_key(metric: Metric) -> tuple[str, str]:
    return metric.task, metric.metric


HASH_COLUMNS = {"doc_hash": "document", "prompt_hash": "prompt"}


def identity_mismatch(
    baseline: tuple[Record, Metric], candidate: tuple[Record, Metric]
) -> str | None:
    """Return one sentence on the first difference between two identities, or None."""
    record, metric = baseline
    other_record, other = candidate
    identity, other_identity = metric_identity(record, metric), metric_identity(other_record, other)
    # Samples that only one of the runs answered are handled by pairing.
    identity["samples"] = metric.n + metric.missing
    other_identity["samples"] = other.n + other.missing
    for name, value in identity.items():
        if value != other_identity[name]:
            return (
                f"{metric.task} is not compared: its {name} is {value} in run {record.id[:8]} "
                f"and {other_identity[name]} in run {other_record.id[:8]}{_cure(name)}"
            )
    return None


def sample_mismatch(baseline: pd.DataFrame, candidate: pd.DataFrame, metric: Metric) -> str | None:
    """Return one sentence on the first difference between two runs' samples, or None."""
    if baseline.empty or candidate.empty:
        return f"{metric.task} is not compared: one of the runs has no recorded samples"
    base, other = _samples_by_document(baseline, metric), _samples_by_document(candidate, metric)
    if not base.index.equals(other.index):
        return f"{metric.task} is not compared: the runs scored different documents"
    for column, noun in _shared_hashes(base, other):
        # Equal task versions and data fingerprints do not guarantee equal prompts (a chat template
        # may have changed), so the questions themselves are compared. NaN differs from itself,
        # hence `fillna`.
        unlike = base[column].fillna("") != other[column].fillna("")
        if unlike.any():
            task, number = unlike.index[int(unlike.to_numpy().argmax())]
            return (
                f"{metric.task} is not compared: the {noun} of {task} document {number} differs "
                f"between the runs, as do {int(unlike.sum()) - 1} more"
            )
    return None


def _samples_by_document(samples: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    return metric_rows(samples, metric).set_index(["task", "doc_id"]).sort_index()


def _shared_hashes(base: pd.DataFrame, other: pd.DataFrame) -> Iterator[tuple[str, str]]:
    # Hashes that only one of the runs recorded cannot be compared.
    return ((c, noun) for c, noun in HASH_COLUMNS.items() if c in base and c in other)


def _cure(name: str) -> str:
    return ": give both the same benchmark.limit" if name == "samples" else ""
