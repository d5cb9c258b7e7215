"""`bench verify`: repeat a part of a run through the same code, and compare sample by sample.

The model is made again from its weights, its methods and its calibration, then scored on the first
samples of each task. Metrics, log-likelihoods and answers are compared with the record's.
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
"""By number format: batches of another size add up in another order."""
EXACT = ("doc_hash", "prompt_hash", "target", "response", "prediction")
"""What must be the same text."""
Key = tuple[str, Any, Any]
Row = dict[str, Any]


def verify(run: str, results_dir: Path, samples: int, tolerance: float | None = None) -> Verdict:
    """Repeat the first `samples` of each task of a run; `run` may be the beginning of its id.

    A number agrees when it differs by at most `tolerance` times its size, or times 1 if it is
    smaller; by default what the model's number format allows.

    Raises:
        UserError: there is no such run, or its weights, data or calibration have changed.
    """
    from bench.device import dtype, pick, use_threads
    from bench.evaluation import evaluate, plan
    from bench.export import recorded_config, repeated
    from bench.records import Store
    from bench.records import samples as stored

    if samples < 1:
        raise UserError(f"--samples {samples}: at least one sample of each task")
    record = Store(results_dir).get(run)
    config = recorded_config(record)
    use_threads(config.threads)
    _refuse_changed_data(config, record)
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
    """Raise when a task's documents are no longer those that the run scored."""
    from bench.evaluation import plan_once

    found = plan_once(config.benchmark, offline=config.offline).fingerprints
    for name, source in record.provenance["data"].items():
        if found.get(name) != source["fingerprint"]:
            raise UserError(f"the data of {name} have changed since the run: it cannot be repeated")


def _verdict(
    record: Record, before: Sequence[Row], now: Sequence[Row], tolerance: float
) -> Verdict:
    """Compare what was stored with what is found now."""
    known = {_key(row): row for row in before}
    faults: list[str] = []
    tasks: dict[str, int] = {}
    numbers, worst = 0, 0.0
    for row in now:
        tasks[row["task"]] = tasks.get(row["task"], 0) + 1
        where = f"{row['task']} sample {row['doc_id']}"
        old = known.get(_key(row))
        if old is None:
            faults.append(f"{where}: not among the run's samples")
            continue
        faults += [f"{where}: another {name}" for name in EXACT if _other(old, row, name)]
        for name, was, value in _numbers(old, row):
            difference = abs(was - value) / max(1.0, abs(was))
            numbers, worst = numbers + 1, max(worst, difference)
            if not difference <= tolerance:
                faults.append(f"{where}: {name} was {was:.6g} and is {value:.6g}")
    if not numbers:
        faults.append("no sample of the run has a number to compare")
    changed = tuple(_changes(record))
    return Verdict(record.id, tasks, numbers, tolerance, worst, tuple(faults), changed)


def _key(row: Row) -> Key:
    """Name one sample; images have no filter, which a table may hold as not a number."""
    name = row["filter"] if isinstance(row["filter"], str) else None
    return row["task"], name, row["doc_id"]


def _other(old: Row, row: Row, name: str) -> bool:
    """Whether a text that both have is not the same."""
    was, value = old.get(name), row.get(name)
    return isinstance(was, str) and isinstance(value, str) and was != value


def _numbers(old: Row, row: Row) -> Iterator[tuple[str, float, float]]:
    """Yield every number of a sample by name, as it was and as it is.

    A number that one side lacks is compared as not a number, which agrees with nothing.
    """
    for name, value in row.items():
        if name == "loglikelihoods":
            was = list(old.get(name, ()))
            if len(was) != len(value):
                yield f"{name} (how many)", float(len(was)), float(len(value))
            pairs = zip(was, value, strict=False)
            yield from ((f"{name}[{i}]", float(a), float(b)) for i, (a, b) in enumerate(pairs))
        elif name != "doc_id" and _is_number(value):
            known: Any = old.get(name)
            yield name, float(known) if _is_number(known) else math.nan, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _changes(record: Record) -> Iterator[str]:
    """Yield what of the environment is another than the run's."""
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
