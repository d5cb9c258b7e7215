"""Identity of a number: which numbers may be subtracted from each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from bench.records import MetricPart, Record
from bench.reporting.comparison.scores import rows_of

LIBRARIES = {"lm_eval": "lm-eval", "lmms_eval": "lmms-eval", "images": "slimbench"}
"""The library whose version is part of the identity, by harness."""

HASHES = {"doc_hash": "document", "prompt_hash": "prompt"}


def identity(record: Record, metric: MetricPart) -> dict[str, Any]:
    """Return everything that two comparable numbers must share, under the names users know."""
    library = LIBRARIES[record.config["benchmark"]["harness"]]
    source = record.provenance.get("data", {}).get(metric.task) or {}
    return {
        "metric": metric.metric,
        "filter": metric.filter,
        "shots": metric.shots,
        "split": metric.split,
        "task version": metric.task_version,
        "harness": f"{library} {record.environment.get('versions', {}).get(library)}",
        "data fingerprint": source.get("fingerprint"),
        "samples": metric.n,
    }


def mismatch(ours: tuple[Record, MetricPart], theirs: tuple[Record, MetricPart]) -> str | None:
    """Return one sentence on the first difference between two identities, or None."""
    record, metric = ours
    other_record, other = theirs
    mine, its = identity(record, metric), identity(other_record, other)
    for name, value in mine.items():
        if value != its[name]:
            return (
                f"{metric.task} is not compared: its {name} is {value} in run {record.id[:8]} "
                f"and {its[name]} in run {other_record.id[:8]}{_cure(name)}"
            )
    return None


def unlike_samples(ours: pd.DataFrame, theirs: pd.DataFrame, metric: MetricPart) -> str | None:
    """Return one sentence on the first difference between two runs' samples, or None."""
    if ours.empty or theirs.empty:
        return f"{metric.task} is not compared: one of the runs has no recorded samples"
    mine, its = _keyed(ours, metric), _keyed(theirs, metric)
    if not mine.index.equals(its.index):
        return f"{metric.task} is not compared: the runs scored different documents"
    for column, noun in _shared(mine, its):
        # Equal task versions and data fingerprints do not guarantee equal prompts (a chat template
        # may have changed), so the questions themselves are compared. NaN differs from itself,
        # hence `fillna`.
        unlike = mine[column].fillna("") != its[column].fillna("")
        if unlike.any():
            task, number = unlike.index[int(unlike.to_numpy().argmax())]
            return (
                f"{metric.task} is not compared: the {noun} of {task} document {number} differs "
                f"between the runs, as do {int(unlike.sum()) - 1} more"
            )
    return None


def _keyed(samples: pd.DataFrame, metric: MetricPart) -> pd.DataFrame:
    return rows_of(samples, metric).set_index(["task", "doc_id"]).sort_index()


def _shared(mine: pd.DataFrame, its: pd.DataFrame) -> Iterator[tuple[str, str]]:
    # A hash that only one of the runs recorded cannot be compared.
    return ((c, noun) for c, noun in HASHES.items() if c in mine and c in its)


def _cure(name: str) -> str:
    return ": give both the same benchmark.limit" if name == "samples" else ""
