"""What a sweep adds to Hydra's own time, and how soon a finished one answers again."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.performance.figure import Figure
from tests.performance.interleaved import times

RUNS = 50
FINISHED = 200
WARM_UP = 2
"""Runs before the clock starts: imports, the loaded model, the caches of config files."""
ROUNDS = 2
AGAIN = 3

# A run that does as little as a run can: one image through the smallest network.
TRIVIAL = [
    "model=micro_lenet",
    "benchmark=images",
    "benchmark.limit=1",
    "threads=1",
    "tracker=none",
]


def figures() -> list[Figure]:
    """Milliseconds a run over Hydra's own; seconds of the re-issued sweep, in its own process."""
    return [_overhead(), _again()]


def _overhead() -> Figure:
    import bench

    with tempfile.TemporaryDirectory() as folder:
        rounds = iter(range(10**6))

        def ours(runs: int = RUNS) -> None:
            records = bench.run([*_sweep(runs), f"results_dir={folder}/{next(rounds)}"])
            assert len(records) == runs

        def hydras(runs: int = RUNS) -> None:
            _hydra_alone([*_sweep(runs), f"results_dir={folder}/hydra"])

        ours(WARM_UP)
        hydras(WARM_UP)
        with_us, alone = times([ours, hydras], ROUNDS, warm_up=False)
    each = [1000 * (a - b) / RUNS for a, b in zip(with_us, alone, strict=True)]
    value = statistics.median(each)
    how = (
        f"{RUNS} runs, Hydra with an empty task {1000 * statistics.median(alone) / RUNS:.0f} ms "
        f"each; median of {ROUNDS}, minimum {min(each):.0f} ms"
    )
    return Figure("a run over Hydra's own", value, "<= 60 ms", value <= 60, how)


def _again() -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        asked = [*_sweep(FINISHED), f"results_dir={folder}"]
        command = [sys.executable, "-P", "-m", "bench", "run", *asked]
        subprocess.run(command, check=True, capture_output=True)
        took = []
        for _ in range(AGAIN):
            began = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            took.append(time.perf_counter() - began)
            assert f"{FINISHED} of them already recorded" in done.stdout
    value = statistics.median(took)
    how = f"whole process, median of {AGAIN}, minimum {min(took):.2f} s"
    return Figure(f"a finished {FINISHED}-run sweep again", value, "<= 3 s", value <= 3, how)


def _sweep(runs: int) -> list[str]:
    return ["-m", *TRIVIAL, f"seed=range(1,{runs + 1})"]


def _hydra_alone(overrides: list[str]) -> None:
    """The same sweep by Hydra's own sweeper and launcher, with a task that does nothing."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    def nothing(composed: DictConfig) -> None:
        return None

    enter = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(nothing)
    folder = Path(tempfile.mkdtemp())
    before = sys.argv
    sys.argv = ["hydra", *overrides, "hydra/sweeper=basic", f"hydra.sweep.dir={folder}"]
    GlobalHydra.instance().clear()
    try:
        enter()
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
