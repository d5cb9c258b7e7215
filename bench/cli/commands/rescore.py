"""`bench rescore RUN`: apply the harness's current filters and metrics to stored answers.

No model is loaded. The documents are loaded and their requests built again; each request is
answered from the run's samples. Any difference from the record then comes from the harness.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import EXIT_DONE
from bench.evaluation import rescore as rescore_rows
from bench.evaluation.metrics import SAMPLE_COLUMNS, SampleRow
from bench.records import Store
from bench.records import samples as recorded_samples
from bench.runner.replay import recorded_config, refuse_changed_data
from bench.runner.session import Session
from bench.ui import console, print_rows

if TYPE_CHECKING:
    from bench.evaluation.metrics import Evaluation
    from bench.records import Metric, Record

MAX_SHOWN_SAMPLES = 10
SampleKey = tuple[str, str | None, int]


@dataclass(frozen=True)
class ChangedSample:
    """A value of a sample that differs from the one that the run stored."""

    task: str
    filter: str | None
    doc_id: int
    column: str
    stored: Any
    rescored: Any

    def __str__(self) -> str:
        return (
            f"{self.task} sample {self.doc_id} ({self.filter}): {self.column} was {self.stored!r} "
            f"and is {self.rescored!r}"
        )


@dataclass(frozen=True)
class Rescored:
    """Stored and new numbers of a run, and the samples that changed."""

    run: str
    metrics: list[dict[str, Any]]
    samples: list[ChangedSample]

    def plain(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return asdict(self)


def rescore(run: str, results_dir: Path, session: Session, allowed: Sequence[str] = ()) -> Rescored:
    """Score a run's stored answers again; `run` may be a prefix of its id.

    `allowed` are the overrides with which the user allows code that the record cannot allow; see
    `bench.runner.replay.recorded_config`.

    Raises:
        UserError: there is no such run, its data or questions changed, its samples lack answers, or
            it used code that is not `allowed`.
    """
    record = Store(results_dir).get(run)
    config = recorded_config(record, allowed)
    refuse_changed_data(config, record, session)
    planned = session.benchmarks.plan(config.benchmark, offline=config.offline)
    stored = [
        _plain_row(row) for row in recorded_samples(record.id, results_dir).to_dict("records")
    ]
    found = rescore_rows(planned, stored)
    return Rescored(
        record.id, list(_metric_rows(record, found)), list(_changed(stored, found.samples))
    )


def _plain_row(row: Mapping[Hashable, Any]) -> SampleRow:
    """Return a row of a data frame with lists instead of arrays, and None for missing values."""
    plain = {str(name): v.tolist() if hasattr(v, "tolist") else v for name, v in row.items()}
    return {name: None if _is_nan(value) else value for name, value in plain.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _metric_rows(record: Record, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield every metric with its stored and its new value; one of them may be missing."""
    known = {_metric_key(metric): metric for metric in record.metrics}
    new = {_metric_key(metric): metric for metric in evaluation.metrics}
    for key in known | new:
        task, metric, through = key
        yield {
            "task": task,
            "metric": metric,
            "filter": through,
            "stored": known[key].value if key in known else None,
            "rescored": new[key].value if key in new else None,
        }


def _metric_key(metric: Metric) -> tuple[str, str, str]:
    return metric.task, metric.metric, metric.filter


def _changed(stored: Sequence[SampleRow], found: Sequence[SampleRow]) -> Iterator[ChangedSample]:
    """Yield every score and every filtered answer that differs from the stored one."""
    known = {_sample_key(row): row for row in stored}
    for row in found:
        key = _sample_key(row)
        # What the model got and generated is the same by construction.
        names = [name for name in row if name not in SAMPLE_COLUMNS or name == "response"]
        for name in names:
            was, value = known.get(key, {}).get(name), row[name]
            if was != value and not (_is_nan(was) and _is_nan(value)):
                yield ChangedSample(*key, name, was, value)


def _sample_key(row: SampleRow) -> SampleKey:
    return row["task"], row.get("filter"), row["doc_id"]


def print_rescored(rescored: Rescored) -> None:
    """Print the numbers side by side, and the first samples that changed."""
    print_rows(rescored.metrics)
    out = console()
    for sample in rescored.samples[:MAX_SHOWN_SAMPLES]:
        out.print(f"differs: {sample}", markup=False)
    more = len(rescored.samples) - MAX_SHOWN_SAMPLES
    if more > 0:
        out.print(f"and {more} more; --json lists them")
    if not rescored.samples:
        out.print("all samples have the same scores as stored")


def run_command(given: argparse.Namespace) -> int:
    """`bench rescore RUN`."""
    with Session() as session:
        rescored = rescore(given.run, given.results_dir, session, given.allowed)
    if given.json:
        print(json.dumps(rescored.plain(), indent=1))
    else:
        print_rescored(rescored)
    return EXIT_DONE
