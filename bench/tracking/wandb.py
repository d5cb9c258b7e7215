"""A record as a run of Weights & Biases: config, metrics, costs, tables, and itself as artifact.

W&B is a projection of the records: it can be rebuilt from them at any time with `bench track`,
and its failure never fails a run. All its files stay inside the results folder.
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
    """Log one record; `folder` holds its files. Returns where the W&B run is kept.

    Raises:
        Exception: whatever W&B raises; the caller decides that it does not matter.
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
    """Open a W&B run whose files stay in the results folder; yield W&B, the run, where it is kept.

    The run is finished whatever happens inside.
    """
    home = (results_dir / "wandb_home").resolve()
    home.mkdir(parents=True, exist_ok=True)
    with _inside(home):
        import wandb

        chosen = mode(config)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            config=config_of_run,
            dir=str(home),
            mode=chosen,
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
    """Write summary, tables and artifact of one record into a W&B run."""
    run.summary.update(summary(record))
    metrics = [m.model_dump() for m in record.metrics]
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
    """Log what a method reports epoch by epoch as curves over its own epochs.

    A report's `history` is a list of lines, each a dict of numbers with its `epoch`.
    """
    for method in record.methods:
        lines = method.report.get("history", [])
        if lines:
            run.define_metric(f"{method.name}/*", step_metric=f"{method.name}/epoch")
        for line in lines:
            run.log({f"{method.name}/{key}": value for key, value in line.items()})


def summary(record: Record) -> dict[str, float]:
    """Return the flat numbers of a record: `task/metric` and `cost/scope/quantity`.

    A cost that was had in two ways goes by its quantity as it comes first, then with `/analytic`.
    """
    values = {f"{m.task}/{m.metric}": m.value for m in record.metrics if m.value is not None}
    for cost in record.costs:
        name = f"cost/{cost.scope}/{cost.quantity}"
        values[f"{name}/{cost.how}" if name in values else name] = cost.value
    return values


def mode(config: TrackerConfig) -> Mode:
    """`auto` is online for a user who is logged in, else offline."""
    if config.mode != "auto":
        return config.mode
    asked = os.environ.get("WANDB_MODE")
    for known in MODES:
        if asked == known:
            return known
    import wandb

    return "online" if wandb.api.api_key else "offline"


@contextmanager
def _inside(home: Path) -> Iterator[None]:
    """Keep all that W&B writes, staging included, below `home`, and keep it quiet."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")
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
