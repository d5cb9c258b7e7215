"""A record and a project's overview as runs of Weights & Biases (W&B).

A record becomes a W&B run with its config, metrics, costs, tables, and the record itself. W&B is
only a mirror of the records: `bench track` can rebuild it at any time, and its failure never fails
a run. All its files stay inside the results folder.

The overview is one W&B run of job type `overview` with leaderboard, Pareto plots, paper tables and
the HTML report. W&B groups panels into sections by the part of a key before the first `/`, so only
the keys define the layout:

    leaderboard/runs     every run with its numbers, sortable and filterable in W&B
    pareto/<setting>     a scatter plot of score against cost, with its data
    tables/<name>        a paper's table: our values and the published ones
    report/page          the HTML report itself
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from bench.records.leaves import flat_items
from bench.records.record import JsonObject, Record, standing_effects
from bench.records.store import CONFIG, RECORD, SAMPLES
from bench.schema import WANDB_INIT_SECONDS, TrackerConfig
from bench.security import redact

if TYPE_CHECKING:
    from wandb import Run, Settings, Table

SWEEP_VARIABLE = "WANDB_SWEEP_ID"
"""Set by the agent of a W&B sweep for the commands that it starts."""
OVERVIEW_ID = "overview"
WandbMode = Literal["online", "offline", "disabled"]
WANDB_MODES: tuple[WandbMode, ...] = ("online", "offline", "disabled")


def send_record(
    record: Record,
    folder: Path,
    config: TrackerConfig,
    results_dir: Path,
    dense_ratio: float | None = None,
) -> str | None:
    """Log one record, whose files are in `folder`; return the URL or folder of the W&B run.

    Return None if W&B is disabled. `dense_ratio` is the score relative to the dense run's, None if
    there is no dense run.

    Raises:
        Exception: any error of W&B; the caller decides whether it matters.
    """
    with open_wandb_run(
        config,
        results_dir,
        name=run_name(record),
        job_type="run",
        group=record.sweep,
        tags=run_tags(record),
        config_of_run=flat_config(record),
        run_id=record.id,
    ) as (wandb, run, kept):
        _log_record(wandb, run, record, _files(folder, config))
        if dense_ratio is not None:
            run.summary["dense_ratio"] = dense_ratio
    return kept


def finish_live_run(
    wandb: ModuleType, run: Run, record: Record, folder: Path, config: TrackerConfig
) -> None:
    """Log a record into the W&B run that was opened at the start of the record's run."""
    # Only the record has marks, the environment, and the methods as applied.
    run.name, run.tags = run_name(record), tuple(run_tags(record))
    run.config.update(flat_config(record), allow_val_change=True)
    run.summary["phase"] = "done"
    _log_record(wandb, run, record, _files(folder, config))


def send_model(record: Record, model: Path, config: TrackerConfig, results_dir: Path) -> str | None:
    """Log an exported model as an artifact of its record's W&B run, the end of its lineage.

    The artifact's metadata contain the name of the dense model, and the run's headline numbers.
    """
    with open_wandb_run(
        config, results_dir, name=run_name(record), job_type="run", run_id=record.id
    ) as (wandb, run, kept):
        made_from = record.model.model_dump(include={"name", "source", "revision", "fingerprint"})
        artifact = wandb.Artifact(
            f"model-{record.id}",
            type="model",
            description=run_name(record),
            metadata={"record": record.id, "made_from": made_from, **summary_columns(record)},
        )
        artifact.add_dir(str(model))
        run.log_artifact(artifact)
    return kept


def run_name(record: Record) -> str:
    """Return the name of a record's W&B run."""
    return f"{record.model.name} {record.label}"


def run_tags(record: Record) -> list[str]:
    """Return the tags of a record's W&B run: the model, the methods, and warnings."""
    return [record.model.name, *(method.name for method in record.methods), *record.marks]


def _files(folder: Path, config: TrackerConfig) -> list[Path]:
    names = (RECORD, CONFIG, SAMPLES) if config.samples else (RECORD, CONFIG)
    return [folder / name for name in names]


@contextmanager
def open_wandb_run(
    config: TrackerConfig,
    results_dir: Path,
    *,
    name: str,
    job_type: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    config_of_run: JsonObject | None = None,
    run_id: str | None = None,
    watched: int | None = None,
) -> Iterator[tuple[ModuleType, Run, str | None]]:
    """Open a W&B run whose files stay in the results folder; yield (wandb, run, URL or folder).

    The third value is None if W&B is disabled. If the block raises, W&B shows the run as
    failed. With a `run_id`, sending again continues the same run of the project. W&B records the
    use of the machine by the process `watched`.
    """
    # Absolute, so that it stays valid if the working directory changes.
    home = (results_dir / "wandb_home").resolve()
    home.mkdir(parents=True, exist_ok=True)
    with _wandb_files_below(home), _masked_arguments():
        # Imported with the variables set, so that even the import writes only there.
        import wandb

        chosen, run_id = wandb_mode(config), _id_in_sweep(run_id)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            config=config_of_run,
            id=run_id,
            # A run that was sent before is overwritten. Offline, W&B ignores this with a warning.
            resume="allow" if run_id is not None and chosen == "online" else None,
            dir=str(home),
            mode=chosen,
            # A host program may already have a W&B run open, which must not be reused.
            reinit="create_new",
            settings=_settings(wandb, config.timeout, watched),
            name=name,
            job_type=job_type,
            group=group,
            tags=tags,
        )
        try:
            kept = run.settings.sync_dir if chosen == "offline" else run.url
            yield wandb, run, None if kept is None else str(kept)
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()


def _id_in_sweep(run_id: str | None) -> str | None:
    """Return the id that the agent of a W&B sweep has chosen, without one the given id."""
    # The agent watches the run of its id and no other.
    return os.environ.get("WANDB_RUN_ID", run_id) if SWEEP_VARIABLE in os.environ else run_id


def _settings(wandb: ModuleType, timeout: float, watched: int | None) -> Settings:
    """Return settings that send nothing of this process but what is logged.

    W&B records the use of the machine by the process `watched`, or not at all.
    """
    settings: Settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=min(WANDB_INIT_SECONDS, timeout),
        # The address of a Git remote may contain a token; the record has the commit.
        disable_git=True,
        save_code=False,
        # The use of the machine while sending a stored record would be meaningless.
        x_disable_stats=watched is None,
        x_stats_pid=watched or os.getpid(),
    )
    return settings


def _log_record(wandb: ModuleType, run: Run, record: Record, files: Sequence[Path]) -> None:
    run.summary.update(wandb_summary(record) | summary_columns(record))
    metrics = [m.model_dump() for m in record.metrics]
    # Tables accept only plain values, so the parts of a cost are converted to JSON text.
    costs = [{**c.model_dump(), "parts": json.dumps(c.parts)} for c in record.costs]
    missing = [m.model_dump() for m in record.missing]
    for name, rows in (("metrics", metrics), ("costs", costs), ("missing", missing)):
        if rows:
            columns = list(rows[0])
            data = [[row[column] for column in columns] for row in rows]
            run.log({name: wandb.Table(columns=columns, data=data)})
    _log_histories(run, record)
    artifact = wandb.Artifact(f"record-{record.id}", type="record")
    # Only known names and no links, because an untrusted folder may contain or link other files.
    for file in files:
        if file.is_file() and not file.is_symlink():
            artifact.add_file(str(file))
    run.log_artifact(artifact)


def _log_histories(run: Run, record: Record) -> None:
    """Log the training history that a method reports, as curves over its own epochs.

    A report's `history` is a list of dicts of numbers, each with its `epoch`.
    """
    for method in record.methods:
        lines = method.report.get("history", [])
        if lines:
            # By default, W&B's x axis counts log calls, which methods of a run would share.
            run.define_metric(f"{method.name}/*", step_metric=f"{method.name}/epoch")
        for line in lines:
            run.log({f"{method.name}/{key}": value for key, value in line.items()})


COLUMN_COSTS = ("flops", "parameters", "bytes", "seconds")
"""Costs with their own columns: the first of each quantity, as in the report's plots."""


def summary_columns(record: Record) -> dict[str, float | str]:
    """Return the columns by which W&B's table of runs can be sorted, under short names.

    They are `method`, `ratio` (of a single method) and `effect`; every headline metric by its task,
    with `TASK_stderr`; `score`, which is the average or the only metric; `flops`, `parameters`,
    `bytes`, `seconds`; and `flops_saving`, `bytes_saving`, the counted shares that all methods
    together saved. The full names in `wandb_summary` include scope and filter.
    """
    effect = "+".join(standing_effects(record.methods)) or "none"
    values: dict[str, float | str] = {"method": record.family, "effect": effect}
    if len(record.methods) == 1 and (ratio := record.methods[0].config.get("ratio")) is not None:
        values["ratio"] = ratio
    heads = [metric for metric in record.metrics if metric.headline]
    score = record.metric("average") or (heads[0] if len(heads) == 1 else None)
    for name, metric in [*((m.task, m) for m in heads), *([("score", score)] if score else [])]:
        if metric.value is not None:
            values[name] = metric.value
        if metric.stderr is not None:
            values[f"{name}_stderr"] = metric.stderr
    for quantity in COLUMN_COSTS:
        found = next((c for c in record.headline_costs if c.quantity == quantity), None)
        if found is not None:
            values[quantity] = found.value
    return values | _savings(record)


def _savings(record: Record) -> dict[str, float]:
    """Return the counted shares of FLOPs and bytes that all methods together saved."""
    checks = [method.check for method in record.methods]
    first, last = (checks[0], checks[-1]) if checks else (None, None)
    if first is None or last is None:
        return {}
    found = {"bytes_saving": 1 - last.after.bytes / first.before.bytes}
    if first.before.flops and last.after.flops is not None:
        found["flops_saving"] = 1 - last.after.flops / first.before.flops
    return found


def flat_config(record: Record) -> JsonObject:
    """Return config and environment of a record with one key per value, such as `model.name`.

    W&B's tables and filters have a column per key.
    """
    return flat_values(record.id, {**record.config, "environment": record.environment})


def flat_values(record: str, content: JsonObject) -> JsonObject:
    """Return nested values with one key per value, and the id of their record."""
    flat = {name: leaf for key, value in content.items() for name, leaf in flat_items(key, value)}
    return {**flat, "record": record}


def wandb_summary(record: Record) -> dict[str, float]:
    """Return the numbers of a record as a flat dict.

    Keys are `task/metric,filter,N-shot`, because a metric may have several filters, and
    `cost/scope/quantity`. If answers are missing, `n` and `missing` of a metric follow below its
    key, because W&B shows only the value. If a cost was obtained in several ways, the headline is
    under `quantity` and another one under, for instance, `quantity/analytic`.
    """
    values: dict[str, float] = {}
    for m in record.metrics:
        key = f"{m.task}/{m.metric},{m.filter},{m.shots}-shot"
        if m.value is not None:
            values[key] = m.value
        if m.missing:
            values |= {f"{key}/n": m.n, f"{key}/missing": m.missing}
    headlines = record.headline_costs
    for cost in record.costs:
        name = f"cost/{cost.scope}/{cost.quantity}"
        values[name if cost in headlines else f"{name}/{cost.how}"] = cost.value
    return values


def wandb_mode(config: TrackerConfig) -> WandbMode:
    """Resolve the mode; `auto` is online for a user who is logged in, else offline."""
    if config.mode != "auto":
        return config.mode
    # W&B's own variable takes precedence over the login, as in any other use of wandb.
    chosen = os.environ.get("WANDB_MODE")
    for known in WANDB_MODES:
        if chosen == known:
            return known
    import wandb

    return "online" if wandb.api.api_key else "offline"


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Hide secrets on the command line of this process, which W&B stores with every run."""
    # In a host program these arguments are not ours.
    before = sys.argv
    sys.argv = list(map(redact, before))
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _wandb_files_below(home: Path) -> Iterator[None]:
    """Keep all files of W&B, including staging, below `home`, and silence it."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")
    # Restored afterwards, because the caller may be a notebook that uses W&B itself.
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


@dataclass(frozen=True)
class WandbTable:
    """A table of plain values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | bool | None]]


@dataclass(frozen=True)
class ScatterPlot:
    """A scatter plot of columns `x` and `y` of `data`."""

    title: str
    x: str
    y: str
    data: WandbTable


@dataclass(frozen=True)
class Overview:
    """Contents of a project's overview; names are unique within each part."""

    leaderboard: WandbTable
    pareto: dict[str, ScatterPlot] = field(default_factory=dict)
    tables: dict[str, WandbTable] = field(default_factory=dict)
    page: Path | None = None


def send_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str | None:
    """Log the overview as a separate W&B run; return its URL or folder, None if W&B is disabled.

    Raises:
        Exception: any error of W&B; the caller decides whether it matters.
    """
    # One id per project, so that sending an overview again continues the same W&B run.
    with open_wandb_run(
        config, results_dir, name="overview", job_type="overview", run_id=OVERVIEW_ID
    ) as (wandb, run, kept):
        run.log({"leaderboard/runs": _to_wandb(wandb, overview.leaderboard)})
        for name, plot in overview.pareto.items():
            drawn = wandb.plot.scatter(
                _to_wandb(wandb, plot.data), plot.x, plot.y, title=plot.title
            )
            run.log({f"pareto/{name}": drawn})
        for name, rows in overview.tables.items():
            run.log({f"tables/{name}": _to_wandb(wandb, rows)})
        if overview.page is not None:
            # `inject` would add W&B's own style sheet to the page.
            run.log({"report/page": wandb.Html(overview.page.read_text("utf-8"), inject=False)})
    return kept


def _to_wandb(wandb: ModuleType, rows: WandbTable) -> Table:
    # Columns may mix missing values with numbers or text, so their types are mixed.
    return wandb.Table(
        columns=list(rows.columns), data=[list(row) for row in rows.rows], allow_mixed_types=True
    )
