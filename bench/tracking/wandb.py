"""A record as a run of Weights & Biases: config, metrics, costs, tables, and the record itself.

W&B only mirrors the records: it can be rebuilt from them at any time with `bench track`, and its
failure never fails a run. All its files stay inside the results folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bench.records.record import Record
from bench.tracking.config import INIT_SECONDS, TrackerConfig

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")


def send(record: Record, folder: Path, config: TrackerConfig, results_dir: Path) -> str:
    """Log one record, whose files are in `folder`; return the URL or folder of the W&B run.

    Raises:
        Exception: any error of W&B; the caller decides whether it matters.
    """
    with opened(
        config,
        results_dir,
        name=f"{record.model.name} {record.label}",
        job_type="run",
        group=record.group,
        tags=[record.model.name, *(m.name for m in record.methods)],
        config_of_run={**record.config, "record": record.id},
    ) as (wandb, run, kept):
        _log(wandb, run, record, folder)
    return kept


@contextmanager
def opened(
    config: TrackerConfig,
    results_dir: Path,
    *,
    config_of_run: dict[str, Any] | None = None,
    **described: Any,
) -> Iterator[tuple[Any, Any, str]]:
    """Open a W&B run whose files stay in the results folder; yield (wandb, run, URL or folder).

    The run is finished even if the block raises.
    """
    # Absolute, so that it stays valid if the working directory changes.
    home = (results_dir / "wandb_home").resolve()
    home.mkdir(parents=True, exist_ok=True)
    with _inside(home):
        # Imported with the variables set, so that not even the import writes elsewhere.
        import wandb

        chosen = mode(config)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            config=config_of_run,
            dir=str(home),
            mode=chosen,
            # A host program may already have a W&B run open, which must not be taken over.
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=min(INIT_SECONDS, config.timeout)
            ),
            **described,
        )
        try:
            yield wandb, run, str(run.settings.sync_dir if chosen == "offline" else run.url)
        finally:
            run.finish()


def _log(wandb: Any, run: Any, record: Record, folder: Path) -> None:
    run.summary.update(summary(record))
    metrics = [m.model_dump() for m in record.metrics]
    # Tables hold plain values only, so the parts of a cost become JSON text.
    costs = [{**c.model_dump(), "parts": json.dumps(c.parts)} for c in record.costs]
    gaps = [g.model_dump() for g in record.gaps]
    for name, rows in (("metrics", metrics), ("costs", costs), ("gaps", gaps)):
        if rows:
            columns = list(rows[0])
            data = [[row[column] for column in columns] for row in rows]
            run.log({name: wandb.Table(columns=columns, data=data)})
    _log_histories(run, record)
    artifact = wandb.Artifact(f"record-{record.id}", type="record")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


def _log_histories(run: Any, record: Record) -> None:
    """Log the training history that a method reports, as curves over its own epochs.

    A report's `history` is a list of dicts of numbers, each with its `epoch`.
    """
    for method in record.methods:
        lines = method.report.get("history", [])
        if lines:
            # W&B's x axis is the log call by default, which two methods of a run would share.
            run.define_metric(f"{method.name}/*", step_metric=f"{method.name}/epoch")
        for line in lines:
            run.log({f"{method.name}/{key}": value for key, value in line.items()})


def summary(record: Record) -> dict[str, float]:
    """Return the numbers of a record as a flat dict: `task/metric` and `cost/scope/quantity`.

    If a cost has both a counted and an analytic value, the first is logged under `quantity` and the
    second under `quantity/analytic`.
    """
    values = {f"{m.task}/{m.metric}": m.value for m in record.metrics if m.value is not None}
    for cost in record.costs:
        name = f"cost/{cost.scope}/{cost.quantity}"
        values[f"{name}/{cost.how}" if name in values else name] = cost.value
    return values


def mode(config: TrackerConfig) -> Mode:
    """Resolve the mode; `auto` is online for a user who is logged in, else offline."""
    if config.mode != "auto":
        return config.mode
    # W&B's own variable decides before the login does, as in any other use of wandb.
    asked = os.environ.get("WANDB_MODE")
    for known in MODES:
        if asked == known:
            return known
    import wandb

    return "online" if wandb.api.api_key else "offline"


@contextmanager
def _inside(home: Path) -> Iterator[None]:
    """Keep all files of W&B, staging included, below `home`, and silence its output."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")
    # Restored afterwards: the caller may be a notebook that uses W&B itself.
    before = {name: os.environ.get(name) for name in (*names, "WANDB_SILENT")}
    os.environ.update({**dict.fromkeys(names, str(home)), "WANDB_SILENT": "true"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
