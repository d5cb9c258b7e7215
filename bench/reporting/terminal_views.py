"""Lists, single records and searches on a terminal."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.plugins import active, config_file
from bench.reporting.cost_table import print_costs
from bench.reporting.record_numbers import differing_settings, metric_scale
from bench.reporting.study import StudyReport, TrialReport, pareto_trials, read_study
from bench.ui import console, draw_rows

if TYPE_CHECKING:
    from bench.records import Record, Store


def list_configs(group: str) -> list[dict[str, object]]:
    """Return the shipped and third-party configs of a group with their first comment line."""
    # Imported here, because Hydra is slow to import and only this list needs it.
    from bench.config.composition import config_names

    return [{group: name, "about": describe_config(group, name)} for name in config_names(group)]


def list_runs(results_dir: Path) -> list[dict[str, object]]:
    """Return one row per record, oldest first, then one per unreadable record with the reason."""
    from bench.records import Store

    store = Store(results_dir)
    rows = _indexed_runs(store)
    listed = {row["run"] for row in rows}
    # Records without rows in the index are unreadable or have no metric; both are read here.
    others = [store.find(run) for run in store.ids() if run not in listed]
    rows += [_run_row(record) for record in others if record is not None]
    rows.sort(key=lambda row: str(row["started"]))
    for run_id, reason in store.unreadable.items():
        empty = dict.fromkeys(("started", "model", "method", "benchmark", "average", "score"))
        rows.append({"run": run_id, **empty, "note": f"unreadable: {reason}"})
    return rows


SHOWN_DIGITS = 8
MAX_ALIKE = 300
"""Maximum number of runs, newest first, that are read to distinguish those of equal names."""
MINUTE = slice(len("2026-"), len("2026-11-29T20:04"))


def shown_runs(rows: Sequence[dict[str, object]], store: Store) -> list[dict[str, object]]:
    """Return the rows of `list_runs` as shown on a terminal, with short ids and times.

    Runs of the same model, method and benchmark get the settings in which they differ.
    """
    differing = _distinguishing_settings(rows, store)
    short = {str(row["run"])[:SHOWN_DIGITS] for row in rows}
    noted = any(row["note"] for row in rows)
    return [
        {
            "run": str(row["run"])[: SHOWN_DIGITS if len(short) == len(rows) else None],
            "started": str(row["started"] or "")[MINUTE].replace("T", " ") or None,
            **{name: row[name] for name in ("model", "method", "benchmark")},
            "score": row["score"],
            **({"differs in": differing.get(str(row["run"])) or None} if differing else {}),
            **({"note": row["note"]} if noted else {}),
        }
        for row in rows
    ]


def _distinguishing_settings(rows: Sequence[dict[str, object]], store: Store) -> dict[str, str]:
    """Return, by id, how runs with the same model, method and benchmark differ."""
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for row in reversed(rows):
        alike[row["model"], row["method"], row["benchmark"]].append(str(row["run"]))
    found: dict[str, str] = {}
    left = MAX_ALIKE
    for ids in (each for each in alike.values() if len(each) > 1):
        records = [store.find(run) for run in ids[:left]]
        left -= len(records)
        differing = differing_settings([record for record in records if record is not None])
        found.update({run: text for run, text in differing.items() if text})
    return found


def _indexed_runs(store: Store) -> list[dict[str, object]]:
    """Return a row per record with metrics from the index, because reading all files is slow."""
    from bench.records.index import index_table
    from bench.records.record import AVERAGE

    names = ("run", "started", "model", "label", "benchmark", "marks", "kind", "task", "metric",
             "value", "headline")  # fmt: skip
    table = index_table(store).select(names)
    found: dict[str, dict[str, object]] = {}
    scores: dict[str, dict[str, str | None]] = {}
    for run, started, model, label, benchmark, marks, kind, task, metric, value, headline in zip(
        *(table[name].to_pylist() for name in names), strict=True
    ):
        if kind != "metric":
            continue
        row = found.setdefault(
            run,
            {
                "run": run,
                "started": started,
                "model": model,
                "method": label,
                "benchmark": benchmark,
                "average": None,
                "score": None,
                "note": marks or None,
            },
        )
        if headline:
            scores.setdefault(run, {})[task] = _score(metric, value)
        if task == AVERAGE:
            row["average"] = value
    for run, own in scores.items():
        # A run of one task has no average and is represented by that task, as in figures.
        found[run]["score"] = next(iter(own.values())) if len(own) == 1 else own.get(AVERAGE)
    return list(found.values())


def _score(metric: str, value: float | None) -> str | None:
    factor, digits = metric_scale(metric)
    if value is None:
        return None
    return f"{factor * value:.{digits}f}" + (" %" if factor == 100.0 else f" {metric}")


def _run_row(record: Record) -> dict[str, object]:
    return {
        "run": record.id,
        "started": record.started,
        "model": record.model.name,
        "method": record.label,
        "benchmark": _benchmark(record),
        "average": None,
        "score": None,
        "note": ", ".join(record.marks) or None,
    }


def _benchmark(record: Record) -> str | None:
    """Return the benchmark's name, or None if the record's config is damaged."""
    benchmark = record.config.get("benchmark")
    return benchmark.get("name") if isinstance(benchmark, dict) else None


DESCRIBING_LINES = 2
"""Maximum number of comment lines for the first sentence of a config."""


def describe_config(group: str, name: str) -> str:
    """Return the first sentence of the comment at the top of a config file, its description."""
    file = config_file(group, name)
    if file is None:
        # A plug-in's class is not imported for its docstring only to list it.
        return f"{target}, a plug-in" if (target := active().methods.get(name)) else ""
    comments = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")
    ]
    # Hydra reads `# @package ...` in the first line, which is a directive.
    described = [line for line in comments if not line.startswith("# @package")]
    text = " ".join(line.removeprefix("# ") for line in described[:DESCRIBING_LINES])
    # The first sentence may continue on the next line; a full stop inside a word does not end it.
    sentence = re.match(r".*?\.(?= |$)", text)
    first = described[0].removeprefix("# ") if described else ""
    return sentence[0] if sentence else first


def print_record(record: Record) -> None:
    """Print the model, methods, metrics and costs of a run."""
    from bench.records.record import lost_zeros

    out = console()
    model = record.model
    out.print(f"{record.id}  {model.name}  {record.label}", style="bold")
    out.print(f"started {record.started}, finished {record.finished}, sweep {record.sweep or '-'}")
    out.print(f"command: {record.command}", soft_wrap=True)
    revision = f" at {model.revision}" if model.revision else ""
    out.print(f"weights: {model.source}{revision}, {model.architecture}")
    out.print(f"         {model.parameters:,} parameters, fingerprint {model.fingerprint[:16]}")
    lost = lost_zeros(record.methods)
    for method in record.methods:
        knobs = ", ".join(f"{key}={value}" for key, value in method.config.items())
        out.print(
            f"method {method.name}: weights {method.confirmed_effect}, {method.seconds:.2f} s "
            f"({knobs})"
        )
        if method.check is not None and method.check.refutation is not None:
            out.print(f"  {method.name} {method.check.refutation}", soft_wrap=True)
        if method.name in lost:
            out.print(f"  {lost[method.name]}", soft_wrap=True)
    draw_rows([_metric_row(record, index) for index in range(len(record.metrics))], "metrics")
    # Only nonzero counts, which would be hard to find among rows of zeros.
    names = ("truncated", "spanning", "tied", "repeated_examples")
    counts = [each.model_dump(include={"task", "documents", *names}) for each in record.evidence]
    caveats = [row for row in counts if any(row[name] for name in names)]
    if caveats:
        draw_rows(caveats, "documents with caveats")
    # Parts and notes are too wide for this table; `print_costs` shows those that matter.
    rows = [c.model_dump(exclude={"parts", "note"}) for c in record.costs]
    draw_rows(rows, "all costs")
    print_costs(record)


def _metric_row(record: Record, index: int) -> dict[str, object]:
    metric = record.metrics[index]
    names = ("task", "metric", "filter", "shots", "split", "value", "stderr", "n", "missing")
    row: dict[str, object] = {name: getattr(metric, name) for name in names}
    return {**row, "headline": "*" if metric.headline else ""}


def print_search(folder: Path) -> None:
    """Print the Pareto set of a search and write `pareto.csv` and `pareto.svg` into its folder."""
    study = read_study(folder)
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
    console().print(f"{len(states)} trials: {counts}; wrote {where}")


def plot_trials(study: StudyReport, path: Path) -> bool:
    """Plot the first objective against the second; return False if there is only one."""
    if len(study["objectives"]) < 2:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Not pyplot, which would select a GUI backend and keep the figure in global state.
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
