"""slimbench: benchmark model-compression methods.

>>> import bench
>>> with bench.Session() as session:
...     dense, pruned = bench.run(["-m", "method=dense,camera_p"], session=session)
>>> print(bench.compare([dense.id, pruned.id]).contrasts)
>>> frame = bench.records.load()

Everything is imported on first use: torch, pandas and Hydra are slow to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench import records
    from bench.method import Context, Method
    from bench.records import Record
    from bench.reporting.comparison import Comparison
    from bench.runner.session import Session

__all__ = ["Context", "Method", "Session", "compare", "plot", "records", "run"]

_LAZY_CLASSES = {
    "Context": "bench.method",
    "Method": "bench.method",
    "Session": "bench.runner.session",
}


def run(overrides: Sequence[str] = (), *, session: Session | None = None) -> list[Record]:
    """Execute the runs that the overrides describe, as `bench run` does, and return the records.

    >>> bench.run(["model=micro_moe", "method=camera_p", "method.camera_p.ratio=0.4"])
    >>> bench.run(["-m", "method=dense,camera_p", "ratio=0.2,0.4"])

    Calls that share a `session` share its loaded model; without one the model is freed at the end.

    Raises:
        UserError: the overrides are wrong, or data or weights are missing.
        RunsFailed: no run succeeded.
    """
    from bench.runner.launch import launch
    from bench.runner.session import Session

    if session is not None:
        return launch(overrides, session).records
    with Session() as own:
        return launch(overrides, own).records


def compare(
    runs: Sequence[str], baseline: str | None = None, results_dir: Path | str = "results"
) -> Comparison:
    """Compare recorded runs, named by ids or prefixes, as `bench compare` does.

    Raises:
        UserError: a run is unknown, only one is named, or the baseline is ambiguous.
    """
    from bench.reporting.comparison.named_runs import compare_runs

    return compare_runs(runs, baseline, Path(results_dir))[0]


def plot(
    kind: str,
    runs: Sequence[str] = (),
    results_dir: Path | str = "results",
    *,
    task: str = "average",
    cost: str = "flops",
    scope: str | None = None,
    knob: str = "ratio",
) -> Figure:
    """Draw a figure of recorded runs, of all without `runs`, as `bench plot KIND` does.

    Raises:
        UserError: the kind or a run is unknown, or the runs have no data for this kind.
    """
    from bench.reporting.plots.figures import PlotRequest, prepare_figure
    from bench.reporting.plots.style import plot_settings

    request = PlotRequest(Path(results_dir), task, cost, scope, knob)
    # matplotlib applies its settings when artists are created, so they must hold while drawing.
    with plot_settings():
        return prepare_figure(kind, runs, request).draw()


def __getattr__(name: str) -> object:
    """Import a name of the public API on first access."""
    if name == "records":
        return importlib.import_module("bench.records")
    if name in _LAZY_CLASSES:
        return getattr(importlib.import_module(_LAZY_CLASSES[name]), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
