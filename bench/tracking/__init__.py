"""Sending records to where a team looks at them: W&B, or nowhere."""

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
"""The runs for which the server did not answer this process in time."""


def track(record: Record, store: Store, config: TrackerConfig) -> str | None:
    """Send one record; return None when that worked, else one sentence on what failed.

    The record itself is on disk before this is called, so a failure here loses nothing:
    `bench track` sends it again. A server that did not answer once is not asked again by this
    process.
    """
    if config.kind == "none":
        return None
    try:
        kept = _send(record, store, config)
    except Exception as error:  # a tracker that fails, however it fails, never fails the run
        reason = sentence(error)
        return (
            f"W&B did not take run {record.id} ({reason}); send it again: bench track {record.id}"
        )
    note = json.dumps({"run": record.id, "tracker": config.kind, "kept": kept}, indent=1)
    write_bytes(Path(store.root) / "tracked" / f"{record.id}.json", note.encode())
    return None


def track_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str | None:
    """Send what a project shows beside its runs; None when that worked, else one sentence."""
    from bench.tracking.overview import send_overview

    try:
        send_overview(overview, config, results_dir)
    except Exception as error:  # as above: a tracker that fails breaks nothing
        reason = sentence(error)
        return f"W&B did not take the overview ({reason}); send it again: bench track"
    return None


def _send(record: Record, store: Store, config: TrackerConfig) -> str:
    """Send online from a process that can be given up, or write offline here and now."""
    from bench.tracking.sending import NoAnswer, send_apart
    from bench.tracking.wandb import mode, send

    if mode(config) != "online":
        return send(record, store.folder(record.id), config, store.root)
    if _silent:
        raise NoAnswer(f"the server was silent for run {_silent[0]}")
    try:
        return send_apart(record.id, store.root, config)
    except NoAnswer:
        _silent.append(record.id)
        raise
