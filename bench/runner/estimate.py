"""Estimates of the runs that arguments describe, except those that are already recorded."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.config.overrides import Overrides
from bench.data import hub
from bench.errors import MissingData, UserError, error_sentence
from bench.records import Store

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.estimation.estimator import Estimator
    from bench.estimation.hardware import HardwareConfig
    from bench.estimation.run_estimate import RunEstimate, SweepEstimate
    from bench.runner.session import Session

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def read_budget(text: str) -> float:
    """Parse a budget, a number with the unit s, min, h or d; return it in seconds.

    Raises:
        UserError: the text has another form, or the budget is not above zero.
    """
    found = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found.group(2) not in _UNITS:
        raise UserError(f"--budget {text}: give a number and a unit, such as 90s, 30min, 6h or 2d")
    seconds = float(found.group(1)) * _UNITS[found.group(2)]
    if seconds <= 0:
        raise UserError(f"--budget {text}: a budget must be above zero, such as 30min or 6h")
    return seconds


def estimate_runs(
    arguments: Sequence[str], hardware: HardwareConfig | None, session: Session
) -> SweepEstimate:
    """Estimate the run, or all runs of the sweep, that the arguments describe; loads no weights.

    The default of `hardware` is this machine, with the threads of each run.

    Raises:
        UserError: an argument is wrong, or a model's architecture cannot be determined.
    """
    from bench.config.sweep_checks import admit, every_config
    from bench.runner.session import host_process_restored

    overrides = Overrides.parse(arguments).without_repeats()
    with host_process_restored():
        if overrides.is_true("offline"):
            hub.go_offline()
        admitted = admit(overrides)
        return estimate_configs(every_config(overrides, admitted), hardware, session)


def estimate_configs(
    configs: Iterator[RunConfig],
    hardware: HardwareConfig | None,
    session: Session,
    *,
    estimator: Estimator | None = None,
    seconds: float | None = None,
) -> SweepEstimate:
    """Estimate runs in order; a run that is recorded, or equal to an earlier one, costs nothing.

    An `estimator` for the same hardware is reused with its cached results. No further run is
    estimated after `seconds`, except that the first run always is.
    """
    from bench.device.devices import threads_set
    from bench.estimation.run_estimate import SweepEstimate

    known: set[str] = set()
    runs: list[RunEstimate] = []
    estimators: dict[str, Estimator] = {}
    began = time.perf_counter()
    for config in configs:
        if seconds is not None and runs and time.perf_counter() - began > seconds:
            return SweepEstimate(tuple(runs), whole=False)
        with threads_set(config.threads):
            used = estimator or _estimator(hardware, estimators, session)
            run, identity = _estimate(config, used, session)
        if identity is not None:
            if not config.force and Store(config.results_dir).find(identity) is not None:
                run = replace(run, state="recorded")
            elif identity in known:
                run = replace(run, state="planned before")
            known.add(identity)
        runs.append(run)
    return SweepEstimate(tuple(runs))


def _estimator(
    hardware: HardwareConfig | None, known: dict[str, Estimator], session: Session
) -> Estimator:
    """Return the estimator of the hardware, or of this machine with its current threads."""
    from bench.estimation.boards import measured_here
    from bench.estimation.estimator import Estimator

    hardware = hardware or measured_here()
    key = hardware.model_dump_json()
    if key not in known:
        known[key] = Estimator(hardware, measures=True, collects=not session.freezes)
    return known[key]


def _estimate(
    config: RunConfig, estimator: Estimator, session: Session
) -> tuple[RunEstimate, str | None]:
    """Return the estimate of a run and its id, which is None if inputs of the run are missing."""
    from bench.models.source import describe_model
    from bench.runner.inputs import resolve_run

    source, download, note = describe_model(config.model, offline=config.offline)
    missing = [] if note is None else [note]
    if source.fingerprint:
        try:
            inputs = resolve_run(config, session)
            return estimator.estimate(config, inputs.source, inputs.benchmark), inputs.id
        except MissingData as error:
            # Data of a method or of the benchmark are missing; the rest can still be estimated.
            missing.append(error_sentence(error))
    planned = None
    try:
        # Building tasks takes seconds, and without a tokenizer they give no estimate.
        if estimator.knows_tokens(config, source):
            planned = session.benchmarks.plan(config.benchmark, offline=config.offline)
    except MissingData as error:
        if error_sentence(error) not in missing:
            missing.append(error_sentence(error))
    run = estimator.estimate(config, source, planned, download=download, missing=missing)
    return run, None


def refuse_above(budget: float, estimate: SweepEstimate) -> None:
    """Raise `UserError` if the upper estimate of the runs to execute exceeds `budget` seconds."""
    from bench.estimation.words import duration

    if estimate.high > budget:
        raise UserError(
            f"--budget {duration(budget)} is too low: {len(estimate.to_do)} runs take "
            f"{duration(estimate.low)} to {duration(estimate.high)}: use fewer runs, "
            "benchmark.limit=N, or a larger budget"
        )
