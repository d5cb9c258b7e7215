"""Lists, one record and a search on a terminal."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from bench.evaluation.metrics import AVERAGE
from bench.reporting.cost_table import print_costs
from bench.security import CONFIG_DIR
from bench.sweeps.job import STUDY_FILE
from bench.ui import console, draw_rows

if TYPE_CHECKING:
    from bench.records import Record


class TrialReport(TypedDict):
    """One trial of a search, as the sweeper writes it."""

    run: str | None
    state: str
    front: bool
    values: list[float]
    params: dict[str, object]


class StudyReport(TypedDict):
    """A search: its name, the direction of each objective, and its trials."""

    study: str
    objectives: dict[str, str]
    trials: list[TrialReport]


def list_configs(group: str) -> list[dict[str, object]]:
    """Return the shipped and third-party configs of a group with their first comment line."""
    # Hydra takes long to import and only this listing needs it.
    from bench.config.composition import config_names

    return [{group: name, "about": _description(group, name)} for name in config_names(group)]


def list_runs(results_dir: Path) -> list[dict[str, object]]:
    """Return one row per record, oldest first, then one per unreadable record with the reason."""
    from bench.records import Store

    store = Store(results_dir)
    rows: list[dict[str, object]] = [
        {
            "run": record.id,
            "started": record.started,
            "model": record.model.name,
            "method": record.label,
            "benchmark": _benchmark(record),
            "average": metric.value if (metric := record.metric(AVERAGE)) else None,
            "note": ", ".join(record.marks) or None,
        }
        for record in store.all()
    ]
    empty = dict.fromkeys(("started", "model", "method", "benchmark", "average"))
    for run_id, reason in store.unreadable.items():
        rows.append({"run": run_id, **empty, "note": f"unreadable: {reason}"})
    return rows


def _benchmark(record: Record) -> str | None:
    """Return the benchmark's name, or None if the record's config is damaged."""
    benchmark = record.config.get("benchmark")
    return benchmark.get("name") if isinstance(benchmark, dict) else None


def _description(group: str, name: str) -> str:
    """Return the first comment of a config file, which describes it."""
    file = CONFIG_DIR / group / f"{name}.yaml"
    if not file.is_file():
        return ""
    comments = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")
    ]
    # Hydra reads `# @package ...` in the first line; it is a directive and no description.
    described = [line for line in comments if not line.startswith("# @package")]
    return described[0].removeprefix("# ") if described else ""


def print_record(record: Record) -> None:
    """Print the model, methods, metrics and costs of a run."""
    out = console()
    model = record.model
    out.print(f"{record.id}  {model.name}  {record.label}", style="bold")
    out.print(f"started {record.started}, finished {record.finished}, sweep {record.sweep or '-'}")
    out.print(f"command: {record.command}", soft_wrap=True)
    revision = f" at {model.revision}" if model.revision else ""
    out.print(f"weights: {model.source}{revision}, {model.architecture}")
    out.print(f"         {model.parameters:,} parameters, fingerprint {model.fingerprint[:16]}")
    for method in record.methods:
        knobs = ", ".join(f"{key}={value}" for key, value in method.config.items())
        out.print(
            f"method {method.name}: weights {method.confirmed_effect}, {method.seconds:.2f} s "
            f"({knobs})"
        )
        if method.check is not None and method.check.refutation is not None:
            out.print(f"  {method.name} {method.check.refutation}", soft_wrap=True)
    draw_rows([_metric_row(record, index) for index in range(len(record.metrics))], "metrics")
    # Parts and notes are too wide for this table; `print_costs` shows the ones that matter.
    rows = [c.model_dump(exclude={"parts", "note"}) for c in record.costs]
    draw_rows(rows, "all costs")
    print_costs(record)


def _metric_row(record: Record, index: int) -> dict[str, object]:
    metric = record.metrics[index]
    names = ("task", "metric", "filter", "shots", "split", "value", "stderr", "n")
    row: dict[str, object] = {name: getattr(metric, name) for name in names}
    return {**row, "headline": "*" if metric.headline else ""}


def print_search(folder: Path) -> None:
    """Print the Pareto set of a search and write `pareto.csv` and `pareto.svg` next to its jobs."""
    study: StudyReport = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
    rows = pareto_trials(study)
    draw_rows(rows, title=f"study {study['study']}: Pareto-optimal trials")
    _write_trials(folder / "pareto.csv", rows)
    drawn = plot_trials(study, folder / "pareto.svg")
    states = [trial["state"] for trial in study["trials"]]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "fail")
        if state in states
    )  # fmt: skip
    where = f"{folder / 'pareto.csv'}" + (f" and {folder / 'pareto.svg'}" if drawn else "")
    console().print(f"{len(states)} trials: {counts}. {where}")


def pareto_trials(study: StudyReport) -> list[dict[str, object]]:
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


def plot_trials(study: StudyReport, path: Path) -> bool:
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
    axes.plot(*_objective_values(complete), "o", color="0.7", label="trials")
    axes.plot(*_objective_values(best), "o-", color="C0", label="Pareto set")
    axes.set(xlabel=across, ylabel=above, title=study["study"])
    axes.legend()
    figure.savefig(path, format="svg")
    return True


def _objective_values(trials: list[TrialReport]) -> tuple[list[float], list[float]]:
    return [t["values"][1] for t in trials], [t["values"][0] for t in trials]


def _write_trials(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
