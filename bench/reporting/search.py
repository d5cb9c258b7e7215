"""Result of a hyperparameter search: its Pareto set as a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from bench.launch import STUDY
from bench.reporting.terminal import console, print_rows


def print_search(folder: Path) -> None:
    """Print the Pareto set of a search and write `pareto.csv` and `pareto.svg` next to its jobs."""
    study = json.loads((folder / STUDY).read_text())
    rows = front(study)
    print_rows(rows, title=f"study {study['study']}: Pareto-optimal trials")
    _write_csv(folder / "pareto.csv", rows)
    drawn = plot(study, folder / "pareto.svg")
    states = [trial["state"] for trial in study["trials"]]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "fail")
        if state in states
    )  # fmt: skip
    where = f"{folder / 'pareto.csv'}" + (f" and {folder / 'pareto.svg'}" if drawn else "")
    console().print(f"{len(states)} trials: {counts}. {where}")


def front(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per Pareto-optimal trial, the best in the first objective first."""
    best = [trial for trial in study["trials"] if trial["front"]]
    # Optuna keeps each objective in its own direction; the sign makes ascending order best first.
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


def plot(study: dict[str, Any], path: Path) -> bool:
    """Plot the first objective against the second; return False if there is only one."""
    if len(study["objectives"]) < 2:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Not pyplot, which would choose a GUI backend and keep the figure in global state.
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    complete = [trial for trial in study["trials"] if trial["state"] == "complete"]
    best = sorted((t for t in complete if t["front"]), key=lambda trial: float(trial["values"][1]))
    above, across = list(study["objectives"])[:2]
    axes.plot(*_points(complete), "o", color="0.7", label="trials")
    axes.plot(*_points(best), "o-", color="C0", label="Pareto set")
    axes.set(xlabel=across, ylabel=above, title=study["study"])
    axes.legend()
    figure.savefig(path, format="svg")
    return True


def _points(trials: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [t["values"][1] for t in trials], [t["values"][0] for t in trials]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
