"""`bench verify`: repeat part of a run with the same code, and compare sample by sample.

The model is rebuilt from its weights, methods and calibration text, or loaded if the run saved it
(keep_weights), then scored on the first samples of each task. Metrics, log-likelihoods and
responses are compared with the recorded ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from bench.errors import EXIT_DONE, EXIT_FAILED, UserError
from bench.evaluation import evaluate, plan
from bench.records import Store
from bench.records import samples as recorded_samples
from bench.runner.replay import (
    environment_changes,
    rebuild_model,
    recorded_config,
    refuse_changed_data,
)
from bench.runner.session import Session
from bench.ui import console, print_json

if TYPE_CHECKING:
    from bench.records import Record

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Relative tolerance per dtype; a different batch size changes the order of summation."""
EXACT_FIELDS = ("doc_hash", "prompt_hash", "target", "response", "prediction", "missing")
"""Text fields that must be identical."""
UNCOMPARED_FIELDS = frozenset(
    {"doc_id", "tied_choices", "truncated_tokens", "spans_join", "in_examples"}
)
"""Numbers that follow from compared ones or from the prompt; older records do not have them."""
MAX_SHOWN_FAULTS = 5
SampleKey = tuple[str, str | None, object]
SampleRow = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Result of repeating a part of a run: samples per task, and which numbers differ.

    `worst` is the largest relative difference. `faults` has one sentence per number that differs by
    more than `tolerance`. `changed` lists versions and devices that differ from the run's, which is
    not a fault in itself.
    """

    run: str
    tasks: dict[str, int]
    numbers: int
    tolerance: float
    worst: float
    faults: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every number is within the tolerance."""
        return not self.faults

    def plain(self) -> dict[str, object]:
        """Return the verdict as JSON values."""
        return {"agrees": self.agrees, **asdict(self)}


def verify(
    run: str,
    results_dir: Path,
    samples: int,
    session: Session,
    tolerance: float | None = None,
    allowed: Sequence[str] = (),
) -> Verdict:
    """Repeat the first `samples` of each task of a run; `run` may be a prefix of its id.

    A number agrees if it differs by at most `tolerance` times its magnitude, or times 1 if that is
    larger; the default tolerance depends on the model's dtype. `allowed` are the overrides with
    which the user allows code that the record cannot allow; see
    `bench.runner.replay.recorded_config`.

    Raises:
        UserError: there is no such run, or its weights, data or calibration text have changed.
    """
    # Imported here, because it loads torch, which is not needed to refuse an unknown run.
    from bench.device.devices import select_device, select_dtype

    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance={tolerance}: it must be a number of at least 0, such as 1e-4")
    store = Store(results_dir)
    record = store.get(run)
    frame = recorded_samples(record.id, results_dir)
    if frame.empty:
        raise UserError(
            f"run {record.id} has no samples to repeat: it measured only perplexity or costs; "
            "`bench run` with force=true repeats all of it"
        )
    config = recorded_config(record, allowed)
    refuse_changed_data(config, record, session)
    # Never beyond the run's own limit, because further samples have no recorded results.
    scored = config.benchmark.limit or samples
    if isinstance(scored, float):  # A fraction of each task.
        scored = int(frame.groupby("task")["doc_id"].nunique().min())
    limit = min(samples, scored)
    # Samples without an answer are compared as well, whatever their share of this part.
    part = config.benchmark.model_copy(update={"limit": limit, "allow_missing": 1.0})
    model = rebuild_model(record, store, session, allowed)
    found = evaluate(model, plan(part, offline=config.offline)).samples
    if tolerance is None:
        number_format = select_dtype(config.model.dtype, select_device(config.model.device))
        tolerance = TOLERANCE[str(number_format).removeprefix("torch.")]
    before = [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
    return _compare(record, before, found, tolerance)


def _compare(
    record: Record, before: Sequence[SampleRow], now: Sequence[SampleRow], tolerance: float
) -> Verdict:
    """Compare the stored samples with the new ones."""
    known = {_sample_key(row): row for row in before}
    faults: list[str] = []
    tasks: dict[str, int] = {}
    numbers, worst = 0, 0.0
    for row in now:
        tasks[row["task"]] = tasks.get(row["task"], 0) + 1
        where = f"{row['task']} sample {row['doc_id']}"
        old = known.get(_sample_key(row))
        if old is None:
            faults.append(f"{where}: not in the run's samples")
            continue
        faults += [
            f"{where}: different {name}" for name in EXACT_FIELDS if _text_differs(old, row, name)
        ]
        for name, was, value in _number_pairs(old, row):
            # If a value was not finite and still is not, it agrees: the run recorded no answer.
            repeated = was == value or (math.isnan(was) and math.isnan(value))
            difference = 0.0 if repeated else abs(was - value) / max(1.0, abs(was))
            numbers, worst = numbers + 1, max(worst, difference)
            # `difference > tolerance` would be false for NaN, which must count as a fault.
            if not difference <= tolerance:
                faults.append(f"{where}: {name} was {was:.6g} and is {value:.6g}")
    if not numbers:
        faults.append("no sample of the run has a number to compare")
    changed = tuple(environment_changes(record))
    return Verdict(record.id, tasks, numbers, tolerance, worst, tuple(faults), changed)


def _sample_key(row: SampleRow) -> SampleKey:
    """Return what a stored sample and a repeated one have in common: task, filter, document."""
    # Samples of classifiers have no filter, which is NaN in the stored frame and equals nothing.
    name = row["filter"] if isinstance(row["filter"], str) else None
    return row["task"], name, row["doc_id"]


def _text_differs(old: SampleRow, row: SampleRow, name: str) -> bool:
    """Return whether a text that both sides have differs."""
    was, value = old.get(name), row.get(name)
    return isinstance(was, str) and isinstance(value, str) and was != value


def _number_pairs(old: SampleRow, row: SampleRow) -> Iterator[tuple[str, float, float]]:
    """Yield every number of a sample by name, as recorded and as computed now.

    A number that one side lacks is yielded as NaN, which never agrees.
    """
    for name, value in row.items():
        if name == "loglikelihoods":
            was = list(old.get(name, ()))
            if len(was) != len(value):
                yield f"{name} (count)", float(len(was)), float(len(value))
            pairs = zip(was, value, strict=False)
            yield from ((f"{name}[{i}]", float(a), float(b)) for i, (a, b) in enumerate(pairs))
        elif name not in UNCOMPARED_FIELDS and _is_number(value):
            known = old.get(name)
            yield name, float(known) if _is_number(known) else math.nan, float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not math.isnan(value)


def print_verdict(verdict: Verdict) -> None:
    """Print whether the run agrees, within which tolerance, and where it does not."""
    out = console()
    samples = ", ".join(f"{task} {count}" for task, count in verdict.tasks.items())
    out.print(f"run {verdict.run}, repeated samples: {samples}")
    for change in verdict.changed:
        out.print(f"changed since the run: {change}")
    for fault in verdict.faults[:MAX_SHOWN_FAULTS]:
        # In a broken environment every number differs, and a few faults suffice to see a pattern.
        out.print(f"differs: {fault}")
    if len(verdict.faults) > MAX_SHOWN_FAULTS:
        out.print(f"and {len(verdict.faults) - MAX_SHOWN_FAULTS} more")
    result = "agrees" if verdict.agrees else "does not agree"
    out.print(
        f"{result}: {verdict.numbers} numbers, relative tolerance {verdict.tolerance:g} (absolute "
        f"below 1), largest difference {verdict.worst:.2g}"
    )


def run_command(given: argparse.Namespace) -> int:
    """`bench verify RUN`."""
    with Session() as session:
        verdict = verify(
            given.run, given.results_dir, given.samples, session, given.tolerance, given.allowed
        )
    if given.json:
        print_json(verdict.plain())
    else:
        print_verdict(verdict)
    return EXIT_DONE if verdict.agrees else EXIT_FAILED
