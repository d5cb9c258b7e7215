"""The paired bootstrap: 10,000 resamples of 10,000 samples of two runs, on one thread.

All scores differ, which is the dear case; accuracies have four kinds of pairs. Beside it, the
plain way of the definition, which gathers resampled scores, in turn in the same process.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from bench.reporting.statistics import resampled_means
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

SAMPLES = RESAMPLES = 10_000
GOAL = 1.0


def figures() -> list[Figure]:
    """Seconds of both cases, and of the plain way over ours."""
    generator = np.random.default_rng(0)
    different_N2 = generator.normal(size=(SAMPLES, 2))
    right_N2 = (generator.random((SAMPLES, 2)) < 0.7).astype(float)

    def plain() -> None:
        for _ in range(RESAMPLES // 10):
            different_N2[generator.integers(0, SAMPLES, SAMPLES)].mean(axis=0)

    with threadpool_limits(1):
        ours, accuracies, tenth = times(
            [
                lambda: resampled_means(different_N2, generator, RESAMPLES),
                lambda: resampled_means(right_N2, generator, RESAMPLES),
                plain,
            ],
            rounds=5,
        )
    faster = 10 * ratio(tenth, ours)[0]
    how = "minimum of 5, interleaved"
    shape = f"{RESAMPLES:,} resamples of {SAMPLES:,} pairs"
    return [
        _seconds(f"bootstrap, {shape}, s", min(ours), how),
        _seconds(f"the same for accuracies, {shape}, s", min(accuracies), how),
        Figure("plain gathering / ours", faster, "> 1", faster > 1, f"{how}; a tenth, times ten"),
    ]


def _seconds(name: str, value: float, how: str) -> Figure:
    return Figure(name, value, f"<= {GOAL:g}", value <= GOAL, how)
