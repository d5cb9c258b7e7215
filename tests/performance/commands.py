"""CPU seconds of commands that people wait for: a diagnosis, prices, views of many records."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.performance.figure import Figure
from tests.reporting.html.synthetic_records import fill

RECORDS, TIMES = 3000, 3
PRICED = {
    "micro_moe": ("model=micro_moe", "method=camera_p"),
    "qwen2_57b": ("model=qwen2_57b_a14b", "method=camera_p"),
    "micro_llava": ("model=micro_llava", "method=yopo_12", "benchmark=mllm_seven_micro"),
    "micro_resnet": ("model=micro_resnet", "method=wgsef", "benchmark=images"),
}
"""What is estimated, on a board whose figures need no measurement."""


def figures() -> list[Figure]:
    """Seconds of processor time of each command, in a process of its own."""
    doctor = _cpu_seconds("doctor")
    prices = {name: _price_seconds(words) for name, words in PRICED.items()}
    with tempfile.TemporaryDirectory() as name:
        results = ["--results-dir", name]
        fill(Path(name), RECORDS, per_task=0)
        first = _cpu_seconds("ls", "runs", *results)
        # Another process on the machine adds to the time of this one, and never takes from it.
        again = min(_cpu_seconds("ls", "runs", *results) for _ in range(TIMES))
        report = min(_cpu_seconds("report", *results) for _ in range(TIMES))
    least = f"{RECORDS:,} records, least of {TIMES}"
    how = f"{least}; {first:.1f} s without their index"
    return [
        Figure("bench doctor", doctor, "<= 5 s", doctor <= 5, "CPU time of the whole process"),
        *(
            Figure(f"bench estimate, {name}", took, "<= 5 s", took <= 5, "CPU time, asked before")
            for name, took in prices.items()
        ),
        Figure("bench ls runs", again, "<= 1.5 s", again <= 1.5, how),
        Figure("bench report", report, "<= 5 s", report <= 5, f"{least}; no samples"),
    ]


def _price_seconds(words: tuple[str, ...]) -> float:
    """Return the seconds of a second estimate: the first draws text that is then remembered."""
    arguments = ("estimate", *words, "hardware=a100_40gb", "offline=true")
    _cpu_seconds(*arguments)
    return _cpu_seconds(*arguments)


def _cpu_seconds(*arguments: str) -> float:
    before = _spent_by_children()
    command = [sys.executable, "-P", "-m", "bench", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return _spent_by_children() - before


def _spent_by_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
