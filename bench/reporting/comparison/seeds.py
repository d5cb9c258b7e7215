"""Comparison of settings over seeds: whether one trains better than another in general.

Tests over samples compare two networks; tests over seeds compare two ways to train them. Runs with
the same setting and different seeds are a series; two series are compared by pairs with equal
seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.errors import UserError
from bench.records import Record
from bench.records.record import AVERAGE, Metric
from bench.reporting.plots.points import series_names
from bench.reporting.record_numbers import (
    metric_scale,
    question_key,
    scored_text,
    setting_names,
)
from bench.reporting.statistics import holm, sign_flip_p
from bench.ui import console, terminal_table


@dataclass(frozen=True)
class SeedContrast:
    """One series against the baseline's, in % if the metric is a fraction.

    `difference` is the mean over the `pairs` of common seeds, `deviation` its standard deviation,
    and `one_sided` whether it has the same sign in every pair; `p` is from a sign-flip test, and
    `p_holm` is corrected over all compared series.
    """

    series: str
    baseline: str
    metric: str
    pairs: int
    mean: float
    baseline_mean: float
    difference: float
    deviation: float
    one_sided: bool
    p: float
    p_holm: float
    higher_is_better: bool = True

    @property
    def better(self) -> bool:
        """Whether the series is better than the baseline's on average."""
        return (self.difference > 0) == self.higher_is_better

    def number_text(self, value: float) -> str:
        """Return a mean of the metric, with one decimal if it is in %."""
        return f"{value:.{self._digits}f}"

    @property
    def difference_text(self) -> str:
        """The difference and its standard deviation, as `-1.2 ± 0.4`."""
        return f"{self.difference:+.{self._digits}f} ± {self.deviation:.{self._digits}f}"

    @property
    def _digits(self) -> int:
        return 1 if self.metric.endswith(" %") else 2


def compare_seeds(records: Sequence[Record], baseline: Record) -> list[SeedContrast]:
    """Compare every series with that of `baseline`.

    A series is compared by its average, or by its task if it has only one.

    Raises:
        UserError: runs have different models or benchmarks, or no series has two seeds in common
            with the baseline's.
    """
    _refuse_different_questions(records, baseline)
    named = series_names(records)
    series: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        series[named[record.id]].append(record)
    own = named[baseline.id]
    if not _by_seed(series[own]):
        raise UserError(
            f"run {baseline.id[:8]} has neither an average nor a single task with a number, which "
            "is needed to compare settings over seeds: choose another baseline"
        )
    contrasts = contrasts_over_seeds(series, own)
    if not contrasts:
        raise UserError(
            f"no other setting shares two seeds with {own}: run it with -m seed=1,2,3,4,5"
        )
    return contrasts


def contrasts_over_seeds(
    series: Mapping[str, Sequence[Record]], baseline: str
) -> list[SeedContrast]:
    """Compare every named series of runs with that of `baseline`, corrected over all of them.

    Series that share fewer than two seeds with the baseline's are left out.
    """
    values = {name: _by_seed(records) for name, records in series.items()}
    contrasts = [
        contrast
        for name in series
        if name != baseline and (contrast := _contrast(name, baseline, values)) is not None
    ]
    adjusted = holm([contrast.p for contrast in contrasts])
    return [replace(c, p_holm=p) for c, p in zip(contrasts, adjusted, strict=True)]


def _by_seed(records: Sequence[Record]) -> dict[object, Metric]:
    """Return the metric that stands for a run, by the run's seed; its value is a number."""
    found: dict[object, Metric] = {}
    # The newest of several runs with the same setting and seed is used, for example after updates.
    for record in sorted(records, key=lambda record: record.started):
        headline = [m for m in record.metrics if m.headline]
        metric = headline[0] if len(headline) == 1 else record.metric(AVERAGE)
        if metric is not None and metric.value is not None:
            found[record.config.get("seed")] = metric
    return found


def _contrast(
    name: str, own: str, values: Mapping[str, Mapping[object, Metric]]
) -> SeedContrast | None:
    here, there = values[name], values[own]
    shared = [seed for seed in here if seed in there]
    if len(shared) < 2:
        return None
    metric = here[shared[0]]
    factor, _ = metric_scale(metric.metric)
    here_S = factor * np.array([here[seed].value for seed in shared])
    there_S = factor * np.array([there[seed].value for seed in shared])
    gap_S = here_S - there_S
    p = sign_flip_p(gap_S)
    return SeedContrast(
        series=name,
        baseline=own,
        metric=metric.metric + (" %" if factor == 100.0 else ""),
        pairs=len(shared),
        mean=float(here_S.mean()),
        baseline_mean=float(there_S.mean()),
        difference=float(gap_S.mean()),
        deviation=float(gap_S.std(ddof=1)),
        one_sided=bool((gap_S > 0).all() or (gap_S < 0).all()),
        p=p,
        p_holm=p,
        higher_is_better=metric.higher_is_better,
    )


def comparable(record: Record, baseline: Record) -> bool:
    """Return whether two runs have the same model and answered the same questions."""
    return question_key(record) == question_key(baseline)


def _refuse_different_questions(records: Sequence[Record], baseline: Record) -> None:
    for record in records:
        if not comparable(record, baseline):
            pair = (record, baseline)
            keys = [question_key(each) for each in pair]
            own, other = setting_names([scored_text(each) for each in pair], keys)
            raise UserError(
                f"run {record.id[:8]} is of {own} and the baseline of {other}: name runs of one "
                "model and one benchmark"
            )


def print_seeds(contrasts: Sequence[SeedContrast]) -> None:
    """Print one line per series, the best first."""
    first = contrasts[0]
    title = f"against {first.baseline} in pairs of seeds, {first.metric}"
    table = terminal_table(
        ("", "pairs", "mean", "baseline", "difference ± sd", "p (Holm)"), title=title
    )
    worth = 1 if first.higher_is_better else -1
    for row in sorted(contrasts, key=lambda c: -worth * c.difference):
        table.add_row(
            row.series,
            str(row.pairs),
            row.number_text(row.mean),
            row.number_text(row.baseline_mean),
            row.difference_text,
            f"{row.p_holm:.3f}",
        )
    console().print(table)
