"""Sending records to an experiment tracker: W&B, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError, error_sentence
from bench.records import Record, Store
from bench.records.files import write_bytes
from bench.schema import TrackerConfig
from bench.tracking import wandb_run
from bench.tracking.upload import LiveRun, Opening, Upload, UploadTimeout, upload_in_subprocess
from bench.tracking.wandb_run import Overview
from bench.tracking.workspace import save_workspace

_unanswered_runs: list[str] = []
"""Runs for which the server did not answer this process in time."""


def follow(run: str, live_run: LiveRun, store: Store, config: TrackerConfig) -> Upload | None:
    """Open the W&B run of a run that starts; return None if it is sent only at its end.

    `config` is that of W&B. The result receives the run's phases and results, and is then passed to
    `track` or abandoned.
    """
    if config.live is False or _unanswered_runs:
        return None
    try:
        # Nobody can watch a run that is written offline.
        if config.live == "auto" and wandb_run.wandb_mode(config) != "online":
            return None
        opening = Opening(run, str(store.root), config.model_dump(), live=live_run)
        return Upload(opening, config.timeout)
    except Exception:  # A tracker must not fail the run; `track` reports the problem.
        return None


def track(
    record: Record,
    store: Store,
    config: TrackerConfig,
    live: Upload | None = None,
    dense_ratio: float | None = None,
) -> str | None:
    """Send one record; return None on success, else one sentence about the failure.

    `live` is the W&B run that has followed this one. `dense_ratio` is the score relative to that of
    the dense run, which requires all records. The record is on disk before this call, so a failure
    loses nothing: `bench track` sends it again. After a timeout this process does not contact the
    server again.
    """
    if config.kind == "none":
        return None
    try:
        kept = _send(record, store, config, live, dense_ratio)
    except Exception as error:  # A tracker must not fail the run.
        reason = error_sentence(error)
        return f"sending run {record.id} to W&B failed ({reason}); retry: bench track {record.id}"
    note = json.dumps({"run": record.id, "tracker": config.kind, "kept": kept}, indent=1)
    write_bytes(Path(store.root) / "tracked" / f"{record.id}.json", note.encode())
    return None


def track_model(record: Record, model: Path, store: Store, config: TrackerConfig) -> str | None:
    """Send a run's exported model; return None on success, else one sentence about the failure.

    Raises:
        UserError: the folder is not an export of this run.
    """
    card = model / "README.md"
    # In W&B, nobody could tell that a model does not belong to the run.
    if not card.is_file() or record.id not in card.read_text("utf-8", "replace"):
        raise UserError(
            f"--model {model}: no model card there names run {record.id}; write the folder by "
            f"`bench export {record.id} {model}`"
        )
    try:
        wandb_run.send_model(record, model, config, store.root)
    except Exception as error:  # A tracker must not fail the command.
        return f"sending the model of run {record.id} to W&B failed ({error_sentence(error)})"
    return None


def track_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str | None:
    """Send a project's overview; return None on success, else one sentence about the failure."""
    try:
        wandb_run.send_overview(overview, config, results_dir)
    except Exception as error:  # A tracker must not fail the command.
        reason = error_sentence(error)
        return f"sending the overview to W&B failed ({reason}); retry: bench track"
    return None


def track_workspace(
    records: Sequence[Record], config: TrackerConfig, results_dir: Path
) -> str | None:
    """Save a project's workspace; return None on success, else one sentence about the failure."""
    try:
        save_workspace(records, config, results_dir)
    except Exception as error:  # A tracker must not fail the command.
        reason = error_sentence(error)
        return f"saving the workspace in W&B failed ({reason}); retry: bench track --workspace"
    return None


def _send(
    record: Record,
    store: Store,
    config: TrackerConfig,
    live: Upload | None,
    dense_ratio: float | None,
) -> str | None:
    """Send online from a subprocess that can be abandoned, or write offline in this process."""
    try:
        if live is not None:
            return live.send() or None
        # Offline mode only writes files and cannot hang; a subprocess would import wandb again.
        if wandb_run.wandb_mode(config) != "online":
            folder = store.folder(record.id)
            return wandb_run.send_record(record, folder, config, store.root, dense_ratio)
        # Otherwise a sweep would wait for the full timeout after every run.
        if _unanswered_runs:
            raise UploadTimeout(f"the server did not answer for run {_unanswered_runs[0]}")
        return upload_in_subprocess(record.id, store.root, config, dense_ratio)
    except UploadTimeout:
        _unanswered_runs.append(record.id)
        raise
