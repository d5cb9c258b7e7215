"""Ten methods on one model: one sweep in one process over ten commands of a process each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable

from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

METHODS = [
    "dense", "camera_p", "camera_p_low_peak", "random_experts", "random_micro_experts",
    "expert_frequency", "reap", "naee", "magnitude", "activation_only",
]  # fmt: skip
SMALL = [
    "model=micro_moe", "benchmark=camera_micro", "benchmark.limit=20", "calibration.rows=8",
    "costs.length=64", "threads=1", "tracker=none",
]  # fmt: skip
ROUNDS = 1
"""One takes minutes, of eleven processes; a run before it warms the disk's cache."""


def figures() -> list[Figure]:
    """Measure whole processes, from the command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = iter(range(10**6))

        def run(*given: str) -> None:
            command = [sys.executable, "-P", "-m", "bench", "run", *SMALL, *given]
            subprocess.run(command, check=True, capture_output=True)

        def together() -> None:
            run("-m", f"method={','.join(METHODS)}", f"results_dir={folder}/{next(rounds)}")

        def apart() -> None:
            place = f"results_dir={folder}/{next(rounds)}"
            for method in METHODS:
                run(f"method={method}", place)

        run("method=dense", f"results_dir={folder}/warm")
        contestants: list[Callable[[], object]] = [together, apart]
        one, ten = times(contestants, ROUNDS, warm_up=False)
    _, value = ratio(one, ten)
    how = f"one process {min(one):.1f} s, ten {min(ten):.1f} s, once each"
    return [Figure("one sweep / ten commands", value, "<= 0.6", value <= 0.6, how)]
