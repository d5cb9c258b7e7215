"""Comparison of runs that a user names: as objects, as JSON, and with images of flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.errors import UserError, refuse_bare_text
from bench.records import Record, Store, samples
from bench.reporting.comparison.comparison import ComparedRun, Comparison, baseline_of, compare
from bench.reporting.comparison.flips import Flip, find_flips, write_flip_images
from bench.reporting.comparison.printer import power_sentences


def compare_runs(
    runs: Sequence[str], baseline: str | None, results_dir: Path, *, flips: int = 0
) -> tuple[Comparison, list[Flip]]:
    """Compare runs named by their ids or id prefixes, and collect up to `flips` flips per task.

    Raises:
        UserError: a run is unknown, only one is named, or the baseline is ambiguous.
    """
    refuse_bare_text("runs", runs, 'bench.compare(["1a2b", "3c4d"])')
    store = Store(results_dir)
    # Two prefixes may identify the same run, which is compared only once.
    records = list({record.id: record for record in map(store.get, runs)}.values())
    if not records:
        raise UserError("no run is named: name at least two runs to compare")
    against = store.get(baseline) if baseline is not None else baseline_of(records)
    candidates = [record for record in records if record.id != against.id]
    if not candidates:
        raise UserError(f"only run {against.id[:8]} is named: name at least two runs to compare")
    baseline_run, *candidate_runs = (
        ComparedRun(r, samples(r.id, results_dir)) for r in (against, *candidates)
    )
    comparison = compare(baseline_run, candidate_runs)
    return comparison, [
        flip for run in candidate_runs for flip in _all_flips(comparison, baseline_run, run, flips)
    ]


def _all_flips(
    comparison: Comparison, baseline: ComparedRun, candidate: ComparedRun, limit: int
) -> list[Flip]:
    """Return the flips of every compared task."""
    if limit < 1:
        return []
    # Only compared tasks, because refused ones scored different questions.
    tasks = [c.task for c in comparison.contrasts if c.run == candidate.record.id]
    metrics = [m for m in map(baseline.record.metric, tasks) if m is not None]
    return [flip for metric in metrics for flip in find_flips(baseline, candidate, metric, limit)]


def flip_images(
    comparison: Comparison, flips: Sequence[Flip], results_dir: Path
) -> tuple[dict[str, list[Path]], str | None]:
    """Write the images of flips; return the files by hash, or the reason why there are none."""
    try:
        return write_flip_images(flips, comparison.baseline, results_dir), None
    # The data may be unavailable on this machine. The comparison is useful without images, so the
    # reason is returned instead of raised.
    except UserError as error:
        return {}, f"images of flips are not shown: {error}"


def comparison_json(
    comparison: Comparison, flips: Sequence[Flip], written: Mapping[str, Sequence[Path]]
) -> dict[str, object]:
    """Return a comparison as JSON values; `written` maps image hashes to the written files."""
    return {
        "baseline": _run_json(comparison.baseline),
        "candidates": [_run_json(record) for record in comparison.candidates],
        "contrasts": [asdict(row) for row in comparison.contrasts],
        "power": power_sentences(comparison),
        "refused": list(comparison.refused),
        "flips": [
            asdict(flip) | {"pictures": [str(path) for path in written.get(flip.image or "", ())]}
            for flip in flips
        ],
    }


def _run_json(record: Record) -> dict[str, object]:
    return {"run": record.id, "model": record.model.name, "label": record.label}
