"""Records as HTML for notebooks: one run, or a table of several runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from bench.ui import clean, format_quantity

# Records, metrics and costs are not typed here, because their module imports this one.


def runs_html(records: Sequence[Any]) -> str:
    """Return a table with a row per run, and a column per task and counted cost of any of them."""
    tasks = dict.fromkeys(m.task for r in records for m in r.metrics if m.headline)
    costs = dict.fromkeys((c.scope, c.quantity) for r in records for c in r.headline_costs)
    header = ["run", "model", "method", *tasks, *(f"{scope} {name}" for scope, name in costs)]
    rows = []
    for record in records:
        found = {(cost.scope, cost.quantity): cost for cost in record.headline_costs}
        scores = [_score(record.metric(task)) for task in tasks]
        amounts = [_amount(found.get(key)) for key in costs]
        method = " ".join([record.label, *(f"({mark})" for mark in record.marks)])
        rows.append([record.id[:8], record.model.name, method, *scores, *amounts])
    return html_table(header, rows)


def record_line(record: Any) -> str:
    """Return one run in a line: its id, model, methods and headline scores."""
    scores = [m for m in record.metrics if m.headline]
    average = [m for m in scores if m.task == "average"] or scores
    shown = ", ".join(f"{m.task} {m.metric} {_score(m) or 'missing'}" for m in average)
    return clean(f"<Record {record.id}: {record.model.name} {record.label}; {shown}>")


def record_html(record: Any) -> str:
    """Return one run: its model and methods, its metrics, and its costs."""
    title = f"{record.id} {record.model.name} {record.label}"
    effects = [[m.name, m.effect, f"{m.seconds:.1f} s"] for m in record.methods]
    metrics = [[m.task, m.metric, _score(m), str(m.n)] for m in record.metrics]
    costs = [[c.scope, c.quantity, _amount(c), c.how] for c in record.costs]
    parts = [f"<p><b>{_cell(title)}</b><br><code>{_cell(record.command)}</code></p>"]
    if effects:
        parts.append(html_table(["method", "weights", "time"], effects))
    parts.append(html_table(["task", "metric", "value", "n"], metrics))
    parts.append(html_table(["cost of", "quantity", "value", "how"], costs))
    return "".join(parts)


def html_table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of strings, with markup escaped."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _score(metric: Any) -> str:
    if metric is None or metric.value is None:
        return ""
    spread = "" if metric.stderr is None else f" ± {metric.stderr:.3g}"
    return f"{metric.value:.4g}{spread}"


def _amount(cost: Any) -> str:
    if cost is None:
        return ""
    unit = "" if cost.unit == "1" else f" {cost.unit}"
    return f"{format_quantity(cost.value)}{unit}"


def _cell(text: str) -> str:
    # Names and commands may come from an untrusted record.
    return escape(clean(text))
