"""Comparison of settings over seeds: whether one trains better than another in general.

Tests over samples compare two networks; tests over seeds compare two ways to train them. Runs with
the same setting and different seeds are a series; two series are compared by pairs with equal
seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.errors import UserError
from bench.records import Record
from bench.records.record import AVERAGE
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

    `difference` is the mean over the `pairs` of common seeds, `deviation` its standard deviation;
    `p` is from a sign-flip test, and `p_holm` is corrected over all compared series.
    """

    series: str
    baseline: str
    metric: str
    pairs: int
    mean: float
    baseline_mean: float
    difference: float
    deviation: float
    p: float
    p_holm: float
    higher_is_better: bool = True


def compare_seeds(records: Sequence[Record], baseline: Record) -> list[SeedContrast]:
    """Compare every series with that of `baseline`.

    A series is compared by its average, or by its task if it has only one.

    Raises:
        UserError: runs have different models or benchmarks, or no series has two seeds in common
            with the baseline's.
    """
    _refuse_different_questions(records, baseline)
    named = series_names(records)
    values: dict[str, dict[object, float]] = defaultdict(dict)
    metric, higher = "", True
    # The newest of several runs with the same setting and seed is used, for example after updates.
    for record in sorted(records, key=lambda record: record.started):
        headline = [m for m in record.metrics if m.headline]
        found = headline[0] if len(headline) == 1 else record.metric(AVERAGE)
        if found is None or found.value is None:
            continue
        factor, _ = metric_scale(found.metric)
        metric = found.metric + (" %" if factor == 100.0 else "")
        higher = found.higher_is_better
        values[named[record.id]][record.config.get("seed")] = factor * found.value
    own = named[baseline.id]
    if own not in values:
        raise UserError(
            f"run {baseline.id[:8]} has neither an average nor a single task with a number, which "
            "is needed to compare settings over seeds: choose another baseline"
        )
    contrasts = [
        replace(contrast, higher_is_better=higher)
        for name in values
        if name != own and (contrast := _contrast(name, own, metric, values)) is not None
    ]
    if not contrasts:
        raise UserError(
            f"no other setting shares two seeds with {own}: run it with -m seed=1,2,3,4,5"
        )
    adjusted = holm([contrast.p for contrast in contrasts])
    return [replace(c, p_holm=p) for c, p in zip(contrasts, adjusted, strict=True)]


def _contrast(
    name: str, own: str, metric: str, values: dict[str, dict[object, float]]
) -> SeedContrast | None:
    shared = [seed for seed in values[name] if seed in values[own]]
    if len(shared) < 2:
        return None
    here_S = np.array([values[name][seed] for seed in shared])
    there_S = np.array([values[own][seed] for seed in shared])
    gap_S = here_S - there_S
    p = sign_flip_p(gap_S)
    return SeedContrast(
        series=name,
        baseline=own,
        metric=metric,
        pairs=len(shared),
        mean=float(here_S.mean()),
        baseline_mean=float(there_S.mean()),
        difference=float(gap_S.mean()),
        deviation=float(gap_S.std(ddof=1)),
        p=p,
        p_holm=p,
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
    digits = 1 if first.metric.endswith(" %") else 2
    worth = 1 if first.higher_is_better else -1
    for row in sorted(contrasts, key=lambda c: -worth * c.difference):
        table.add_row(
            row.series,
            str(row.pairs),
            f"{row.mean:.{digits}f}",
            f"{row.baseline_mean:.{digits}f}",
            f"{row.difference:+.{digits}f} ± {row.deviation:.{digits}f}",
            f"{row.p_holm:.3f}",
        )
    console().print(table)
