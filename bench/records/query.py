"""Records as pandas data frames: one long table of metrics and costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.record import Record
from bench.records.store import SAMPLES, Store

if TYPE_CHECKING:
    import pandas as pd


def load(results_dir: str | Path = "results") -> pd.DataFrame:
    """Return all records of a results folder as one long data frame.

    One row per metric (`kind == "metric"`) and per cost (`kind == "cost"`); the columns that
    describe the run (`run`, `model`, `label`, `methods`, `saving`, `started`, `group`) repeat.
    """
    import pandas as pd

    rows = [row for record in Store(Path(results_dir)).all() for row in _rows(record)]
    return pd.DataFrame(rows)


def samples(run: str, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return the scored samples of one run, one row each."""
    import pandas as pd

    store = Store(Path(results_dir))
    return pd.read_parquet(store.folder(store.get(run).id) / SAMPLES)


def _rows(record: Record) -> list[dict[str, Any]]:
    described = {
        "run": record.id,
        "started": record.started,
        "group": record.group,
        "model": record.model.name,
        "label": record.label,
        "methods": "+".join(method.name for method in record.methods) or "dense",
        "saving": "+".join(method.saving for method in record.methods) or "none",
        "ratio": next((m.config["ratio"] for m in record.methods if "ratio" in m.config), None),
    }
    metrics = [{"kind": "metric", **m.model_dump()} for m in record.metrics]
    costs = [{"kind": "cost", **c.model_dump(exclude={"parts"})} for c in record.costs]
    return [{**described, **row} for row in (*metrics, *costs)]
