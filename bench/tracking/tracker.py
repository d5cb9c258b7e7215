"""Send records to an experiment tracker: W&B, or none."""

from __future__ import annotations

import json
from pathlib import Path

from bench.errors import error_sentence
from bench.records import Record, Store
from bench.records.files import write_bytes
from bench.schema import TrackerConfig
from bench.tracking.wandb_run import Overview

_unanswered_runs: list[str] = []
"""Runs for which the server did not answer this process in time."""


def track(record: Record, store: Store, config: TrackerConfig) -> str | None:
    """Send one record; return None on success, else one sentence about the failure.

    The record is on disk before this is called, so a failure loses nothing: `bench track` sends it
    again. After one timeout this process does not contact the server again.
    """
    if config.kind == "none":
        return None
    try:
        kept = _send(record, store, config)
    except Exception as error:  # whatever a tracker raises, it must not fail the run
        reason = error_sentence(error)
        return f"sending run {record.id} to W&B failed ({reason}); retry: bench track {record.id}"
    note = json.dumps({"run": record.id, "tracker": config.kind, "kept": kept}, indent=1)
    write_bytes(Path(store.root) / "tracked" / f"{record.id}.json", note.encode())
    return None


def track_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str | None:
    """Send a project's overview; return None on success, else one sentence about the failure."""
    from bench.tracking.wandb_run import send_overview

    try:
        send_overview(overview, config, results_dir)
    except Exception as error:  # as above
        reason = error_sentence(error)
        return f"sending the overview to W&B failed ({reason}); retry: bench track"
    return None


def _send(record: Record, store: Store, config: TrackerConfig) -> str | None:
    """Send online from a subprocess that can be abandoned, or write offline in this process."""
    from bench.tracking.upload import UploadTimeout, upload_in_subprocess
    from bench.tracking.wandb_run import send_record, wandb_mode

    # Offline mode only writes files, which cannot hang; a subprocess would import wandb again.
    if wandb_mode(config) != "online":
        return send_record(record, store.folder(record.id), config, store.root)
    # A sweep would otherwise wait the full timeout after every one of its runs.
    if _unanswered_runs:
        raise UploadTimeout(f"the server did not answer for run {_unanswered_runs[0]}")
    try:
        return upload_in_subprocess(record.id, store.root, config)
    except UploadTimeout:
        _unanswered_runs.append(record.id)
        raise
