"""slimbench: benchmark model-compression methods.

>>> import bench
>>> with bench.Session() as session:
...     dense, pruned = bench.run(over={"method": ["dense", "camera_p"]}, session=session)
>>> print(bench.compare([dense, pruned]).contrasts)
>>> frame = bench.records.load()

Everything is imported on first use: torch, pandas and Hydra are slow to import.
"""

from __future__ import annotations

import functools
import importlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench import records
    from bench.estimation.run_estimate import SweepEstimate
    from bench.method import Context, Method
    from bench.records import Record
    from bench.reporting.comparison import Comparison
    from bench.runner.launch import Runs
    from bench.runner.session import Session

__all__ = ["Context", "Method", "Session", "compare", "estimate", "plot", "records", "run"]

_LAZY_CLASSES = {
    "Context": "bench.method",
    "Method": "bench.method",
    "Session": "bench.runner.session",
}

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


def _generators_kept(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
    """Let a function of the API leave the global random generators of the process as they were.

    Libraries draw from them: rich does when it is first imported.
    """

    @functools.wraps(function)
    def call(*given: _Given.args, **named: _Given.kwargs) -> _Returned:
        from bench.device.devices import generators_restored

        with generators_restored():
            return function(*given, **named)

    return call


@_generators_kept
def run(
    overrides: str | Sequence[str] = (),
    *,
    over: Mapping[str, Sequence[object]] | None = None,
    session: Session | None = None,
    **config: object,
) -> Runs:
    """Execute the runs that the arguments describe, as `bench run` does, and return the records.

    >>> bench.run(model="micro_moe", method="camera_p", ratio=0.4)
    >>> bench.run(method=["camera_p", "camera_q"], benchmark="camera_micro")  # one after the other
    >>> bench.run(over={"method": ["dense", "camera_p"], "ratio": [0.2, 0.4]})  # a sweep
    >>> bench.run("-m method=dense,camera_p ratio=0.2,0.4")  # the words of the command line

    A keyword is a key of the config; a mapping as its value holds nested keys. `overrides` are
    arguments of the command line, as one string or a list, and are applied before the keywords.
    `over` maps keys to lists of values, all combinations of which are run. Calls with the same
    `session` share its loaded model; without a session the model is freed at the end. A notebook
    shows the result as a table.

    Raises:
        UserError: the arguments are wrong, or data or weights are missing.
        RunsFailed: no run succeeded.
    """
    from bench.runner.launch import Runs, launch
    from bench.runner.session import Session

    given = _given_words("run", overrides, config, over)
    if session is not None:
        return Runs(launch(given, session).records)
    with Session() as own:
        return Runs(launch(given, own).records)


@_generators_kept
def estimate(
    overrides: str | Sequence[str] = (),
    *,
    hardware: str = "here",
    over: Mapping[str, Sequence[object]] | None = None,
    **config: object,
) -> SweepEstimate:
    """Estimate the runs that the arguments describe, as `bench estimate` does, without running.

    >>> bench.estimate(model="qwen2_57b_a14b", method="camera_p", hardware="a100_40gb")

    The arguments are those of `run`; `hardware` is `here` or a name in conf/hardware.

    Raises:
        UserError: the arguments are wrong, or a model's config cannot be reached.
    """
    from bench.estimation.boards import load_hardware
    from bench.estimation.hardware import HERE
    from bench.runner.estimate import estimate_runs
    from bench.runner.session import Session

    given = _given_words("estimate", overrides, config, over)
    board = None if hardware == HERE else load_hardware(hardware)
    with Session() as session:
        return estimate_runs(given, board, session)


@_generators_kept
def compare(
    runs: Sequence[str | Record],
    baseline: str | Record | None = None,
    results_dir: Path | str | None = None,
) -> Comparison:
    """Compare recorded runs, given as records, ids or prefixes of ids, as `bench compare` does.

    The default of `results_dir` is the folder of the given records, or else `results`. A notebook
    shows the result as a table.

    Raises:
        UserError: a run is unknown, only one is named, or the baseline is ambiguous.
    """
    from bench.reporting.comparison.named_runs import compare_runs

    against = None if baseline is None else _run_names([baseline])[0]
    names = _run_names(runs)
    named = [*runs, baseline] if isinstance(names, list) else []
    return compare_runs(names, against, _results_folder(named, results_dir))[0]


@_generators_kept
def plot(
    kind: str,
    runs: Sequence[str | Record] = (),
    results_dir: Path | str | None = None,
    *,
    task: str = "average",
    cost: str = "flops",
    scope: str | None = None,
    knob: str = "ratio",
) -> Figure:
    """Draw a figure of recorded runs (all if `runs` is empty), as `bench plot KIND` does.

    The default of `results_dir` is the folder of the given records, or else `results`.

    Raises:
        UserError: the kind or a run is unknown, or the runs have no data for this kind.
    """
    from bench.reporting.plots.figures import PlotRequest, prepare_figure
    from bench.reporting.plots.style import plot_settings

    names = _run_names(runs)
    folder = _results_folder(runs if isinstance(names, list) else [], results_dir)
    request = PlotRequest(folder, task, cost, scope, knob)
    # matplotlib applies its settings when artists are created, so they must hold while drawing.
    with plot_settings():
        return prepare_figure(kind, names, request).draw()


def _given_words(
    function: str,
    overrides: str | Sequence[str],
    config: Mapping[str, object],
    over: Mapping[str, Sequence[object]] | None,
) -> list[str]:
    """Convert the arguments of a function of this module into those of the command line."""
    from bench.config.overrides import keyword_overrides
    from bench.errors import UserError, refuse_bare_text

    if not isinstance(over or {}, Mapping):
        raise UserError(f"over={over!r} is not a mapping of keys to lists of values")
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else overrides
    except ValueError as error:  # a quotation without an end
        raise UserError(f"overrides={overrides!r}: {error}") from None
    refuse_bare_text("overrides", words, f'bench.{function}(["model=micro_moe", "ratio=0.4"])')
    return [*words, *keyword_overrides(config, over or {})]


def _run_names(runs: Sequence[str | Record]) -> Sequence[str]:
    # Anything but a list of runs, such as a single one, is passed on to be refused with a message.
    single = isinstance(runs, str) or hasattr(runs, "id") or not isinstance(runs, Iterable)
    names: Sequence[Any] = (
        getattr(runs, "id", runs) if single else [getattr(run, "id", run) for run in runs]
    )
    return names


def _results_folder(runs: Sequence[str | Record | None], given: Path | str | None) -> Path:
    """Return the folder in which to look up runs: the given one, or that of the records."""
    if given is not None:
        return Path(given)
    # The config of a record comes from a file, and may lack the key or have any value.
    configs = [getattr(run, "config", {}) for run in runs]
    folders = {str(config["results_dir"]) for config in configs if config.get("results_dir")}
    return Path(folders.pop() if len(folders) == 1 else "results")


def __dir__() -> list[str]:
    """List the public API only, which is what a notebook completes."""
    return __all__


def __getattr__(name: str) -> object:
    """Import a name of the public API on first access."""
    if name == "records":
        return importlib.import_module("bench.records")
    if name in _LAZY_CLASSES:
        return getattr(importlib.import_module(_LAZY_CLASSES[name]), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
