"""Searches: objectives and trials, read from the file that a sweeper writes into its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, TypeAdapter

# Below Python 3.12, pydantic requires this TypedDict.
from typing_extensions import TypedDict

from bench.errors import UserError
from bench.records.files import read_json, reason_of, warn_once
from bench.sweeps.job import STUDY_FILE
from bench.sweeps.plan import SWEEPS


class TrialReport(TypedDict):
    """One trial of a search, as written by the sweeper."""

    run: str | None
    state: str
    front: bool
    # Empty if the trial failed.
    values: Annotated[list[float], BeforeValidator(lambda values: values or [])]
    params: dict[str, object]


class StudyReport(TypedDict):
    """A search: its name, the direction of each objective, and its trials in order."""

    study: str
    objectives: dict[str, Literal["maximize", "minimize"]]
    trials: list[TrialReport]


def read_study(folder: Path) -> StudyReport:
    """Return the search of a sweep's folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / STUDY_FILE
    try:
        return _parsed(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None


def _parsed(path: Path) -> StudyReport:
    study = TypeAdapter(StudyReport).validate_python(read_json(path))
    if not study["objectives"]:
        raise ValueError("it has no objective")
    known = [trial for trial in study["trials"] if trial["front"] or trial["state"] == "complete"]
    if any(len(trial["values"]) != len(study["objectives"]) for trial in known):
        raise ValueError("a trial does not have one value per objective")
    return study


@dataclass(frozen=True)
class Study:
    """A search, and the names of all sweeps that added trials to it, newest first."""

    report: StudyReport
    sweeps: tuple[str, ...]


def studies_in(results_dir: Path) -> list[Study]:
    """Return every search of a results folder, newest first; warn about damaged ones."""
    found: dict[str, Study] = {}
    # Folders are named by their start time, so that the reverse order is newest first.
    for path in sorted((results_dir / SWEEPS).glob(f"*/{STUDY_FILE}"), reverse=True):
        sweep = path.parent.name
        try:
            report = _parsed(path)
        except (OSError, ValueError) as error:
            warn_once(path, error)
            continue
        # Each sweep of a study writes all of its trials, including those of earlier sweeps.
        newest = found.get(report["study"], Study(report, ()))
        found[report["study"]] = Study(newest.report, (*newest.sweeps, sweep))
    return list(found.values())


def pareto_trials(study: StudyReport) -> list[dict[str, object]]:
    """Return one row per Pareto-optimal trial, sorted by the first objective, best first."""
    best = [trial for trial in study["trials"] if trial["front"]]
    # Optuna stores objectives in their own direction; the sign makes ascending order best first.
    sign = -1.0 if next(iter(study["objectives"].values())) == "maximize" else 1.0
    best.sort(key=lambda trial: sign * float(trial["values"][0]))
    return [
        {
            "run": trial["run"],
            **dict(zip(study["objectives"], trial["values"], strict=True)),
            **{key.removeprefix("method."): value for key, value in trial["params"].items()},
        }
        for trial in best
    ]


def best_so_far(study: StudyReport, objective: str) -> list[float | None]:
    """Return the best value of an objective after each trial, None before the first value.

    Trials that failed or were stopped early have no value and do not change the best one.
    """
    place = list(study["objectives"]).index(objective)
    choose = max if study["objectives"][objective] == "maximize" else min
    best: float | None = None
    found: list[float | None] = []
    for trial in study["trials"]:
        value = trial["values"][place] if trial["state"] == "complete" else math.nan
        if math.isfinite(value):
            best = value if best is None else choose(best, value)
        found.append(best)
    return found
