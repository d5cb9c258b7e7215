"""`bench verify`: repeat part of a run with the same code, and compare sample by sample.

The model is rebuilt from its weights, methods and calibration text, then scored on the first
samples of each task. Metrics, log-likelihoods and responses are compared with the recorded ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.reporting.verdict import Verdict

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.records import Record

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Tolerance per dtype; a different batch size changes summation order."""
EXACT = ("doc_hash", "prompt_hash", "target", "response", "prediction")
"""Text fields that must be identical."""
Key = tuple[str, Any, Any]
Row = dict[str, Any]


def verify(run: str, results_dir: Path, samples: int, tolerance: float | None = None) -> Verdict:
    """Repeat the first `samples` of each task of a run; `run` may be a prefix of its id.

    A number agrees if it differs by at most `tolerance` times its magnitude, or times 1 if that is
    larger; the default tolerance depends on the model's dtype.

    Raises:
        UserError: there is no such run, or its weights, data or calibration text have changed.
    """
    from bench.device import dtype, pick, use_threads
    from bench.evaluation import evaluate, plan
    from bench.export import recorded_config, repeated
    from bench.records import Store
    from bench.records import samples as stored

    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    record = Store(results_dir).get(run)
    config = recorded_config(record)
    use_threads(config.threads)
    _refuse_changed_data(config, record)
    # Never beyond the run's own limit: further samples were not scored and could not be compared.
    limit = min(samples, config.benchmark.limit or samples)
    part = config.benchmark.model_copy(update={"limit": limit})
    found = evaluate(repeated(record), plan(part, offline=config.offline)).samples
    if tolerance is None:
        number_format = dtype(config.model.dtype, pick(config.model.device))
        tolerance = TOLERANCE[str(number_format).removeprefix("torch.")]
    frame = stored(record.id, results_dir)
    before = [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
    return _verdict(record, before, found, tolerance)


def _refuse_changed_data(config: RunConfig, record: Record) -> None:
    """Raise if a task's documents differ from those that the run scored."""
    from bench.evaluation import plan_once

    # The run's own benchmark and not the limited one, so that fingerprints are comparable.
    found = plan_once(config.benchmark, offline=config.offline).fingerprints
    for name, source in record.provenance["data"].items():
        if found.get(name) != source["fingerprint"]:
            raise UserError(f"the data of {name} changed since the run, so it cannot be repeated")


def _verdict(
    record: Record, before: Sequence[Row], now: Sequence[Row], tolerance: float
) -> Verdict:
    """Compare the stored samples with the new ones."""
    known = {_key(row): row for row in before}
    faults: list[str] = []
    tasks: dict[str, int] = {}
    numbers, worst = 0, 0.0
    for row in now:
        tasks[row["task"]] = tasks.get(row["task"], 0) + 1
        where = f"{row['task']} sample {row['doc_id']}"
        old = known.get(_key(row))
        if old is None:
            faults.append(f"{where}: not in the run's samples")
            continue
        faults += [f"{where}: different {name}" for name in EXACT if _other(old, row, name)]
        for name, was, value in _numbers(old, row):
            difference = abs(was - value) / max(1.0, abs(was))
            numbers, worst = numbers + 1, max(worst, difference)
            # Not `difference > tolerance`: a NaN compares false and must count as a fault.
            if not difference <= tolerance:
                faults.append(f"{where}: {name} was {was:.6g} and is {value:.6g}")
    if not numbers:
        faults.append("no sample of the run has a number to compare")
    changed = tuple(_changes(record))
    return Verdict(record.id, tasks, numbers, tolerance, worst, tuple(faults), changed)


def _key(row: Row) -> Key:
    """Identify a sample."""
    # Image rows have no filter, which the stored frame holds as NaN, and NaN equals nothing.
    name = row["filter"] if isinstance(row["filter"], str) else None
    return row["task"], name, row["doc_id"]


def _other(old: Row, row: Row, name: str) -> bool:
    """Return whether a text present on both sides differs."""
    was, value = old.get(name), row.get(name)
    return isinstance(was, str) and isinstance(value, str) and was != value


def _numbers(old: Row, row: Row) -> Iterator[tuple[str, float, float]]:
    """Yield every number of a sample by name, as recorded and as computed now.

    A number missing on one side is yielded as NaN, which agrees with nothing.
    """
    for name, value in row.items():
        if name == "loglikelihoods":
            was = list(old.get(name, ()))
            if len(was) != len(value):
                yield f"{name} (count)", float(len(was)), float(len(value))
            pairs = zip(was, value, strict=False)
            yield from ((f"{name}[{i}]", float(a), float(b)) for i, (a, b) in enumerate(pairs))
        elif name != "doc_id" and _is_number(value):
            known: Any = old.get(name)
            yield name, float(known) if _is_number(known) else math.nan, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _changes(record: Record) -> Iterator[str]:
    """Yield the differences between the run's environment and this one."""
    from bench.device import describe
    from bench.run import versions

    for name, now in versions().items():
        was = record.environment["versions"].get(name)
        if was != now:
            yield f"{name} was {was} and is {now}"
    for name, now in describe().items():
        was = record.environment.get(name)
        if was != now:
            yield f"{name} was {was} and is {now}"
