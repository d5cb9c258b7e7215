"""Send records to an experiment tracker: W&B, or none."""

from __future__ import annotations

import json
from pathlib import Path

from bench.errors import sentence
from bench.records import Record, Store
from bench.records.atomic import write_bytes
from bench.tracking.config import TrackerConfig
from bench.tracking.overview import Overview, Rows, Scatter

__all__ = ["Overview", "Rows", "Scatter", "TrackerConfig", "track", "track_overview"]

_silent: list[str] = []
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
        reason = sentence(error)
        return f"sending run {record.id} to W&B failed ({reason}); retry: bench track {record.id}"
    note = json.dumps({"run": record.id, "tracker": config.kind, "kept": kept}, indent=1)
    write_bytes(Path(store.root) / "tracked" / f"{record.id}.json", note.encode())
    return None


def track_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str | None:
    """Send a project's overview; return None on success, else one sentence about the failure."""
    from bench.tracking.overview import send_overview

    try:
        send_overview(overview, config, results_dir)
    except Exception as error:  # as above
        reason = sentence(error)
        return f"sending the overview to W&B failed ({reason}); retry: bench track"
    return None


def _send(record: Record, store: Store, config: TrackerConfig) -> str:
    """Send online from a subprocess that can be abandoned, or write offline in this process."""
    from bench.tracking.sending import NoAnswer, send_apart
    from bench.tracking.wandb import mode, send

    # Offline mode only writes files, which cannot hang; a subprocess would import wandb again.
    if mode(config) != "online":
        return send(record, store.folder(record.id), config, store.root)
    # A sweep would otherwise wait the full timeout after every one of its runs.
    if _silent:
        raise NoAnswer(f"the server did not answer for run {_silent[0]}")
    try:
        return send_apart(record.id, store.root, config)
    except NoAnswer:
        _silent.append(record.id)
        raise
