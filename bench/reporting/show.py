"""Print one record for reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.reporting.costs import print_costs
from bench.reporting.terminal import console, print_rows

if TYPE_CHECKING:
    from bench.records import Record


def print_record(record: Record) -> None:
    """Print the model, methods, metrics and costs of a run."""
    out = console()
    model = record.model
    out.print(f"[bold]{record.id}[/bold]  {model.name}  {record.label}")
    out.print(f"started {record.started}, finished {record.finished}, sweep {record.group or '-'}")
    out.print(f"command: {record.command}", soft_wrap=True)
    revision = f" at {model.revision}" if model.revision else ""
    out.print(f"weights: {model.source}{revision}, {model.architecture}")
    out.print(f"         {model.parameters:,} parameters, fingerprint {model.fingerprint[:16]}")
    for method in record.methods:
        knobs = ", ".join(f"{key}={value}" for key, value in method.config.items())
        out.print(
            f"method {method.name}: weights {method.saving}, {method.seconds:.2f} s ({knobs})"
        )
    print_rows([_metric_row(record, index) for index in range(len(record.metrics))], "metrics")
    # Parts and notes are too wide for this table; `print_costs` shows the ones that matter.
    rows = [c.model_dump(exclude={"parts", "note"}) for c in record.costs]
    print_rows(rows, "all costs")
    print_costs(record)


def _metric_row(record: Record, index: int) -> dict[str, object]:
    metric = record.metrics[index]
    names = ("task", "metric", "filter", "shots", "split", "value", "stderr", "n")
    row: dict[str, object] = {name: getattr(metric, name) for name in names}
    return {**row, "headline": "*" if metric.headline else ""}
