"""Sample rows: one flat dictionary per scored sample, with the same columns for every harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS: dict[str, Any] = {
    "task": None,
    "filter": None,
    "doc_id": None,
    "doc_hash": None,
    "prompt_hash": None,
    "target": None,
    "prompt": None,
    "choices": (),
    "loglikelihoods": (),
    "greedy": (),
    "response": None,
    "n_tokens": None,
}
"""First columns of every sample row, with the value used where a task has none."""

METRICS = ("acc", "acc_norm", "exact_match")
"""Metric columns that are always present; further metrics append theirs."""


def aligned(found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Give all rows the same columns in the same order; a missing list is empty, the rest None."""
    extra = dict.fromkeys(key for row in found for key in row if key not in COLUMNS)
    blank = {**COLUMNS, **dict.fromkeys(METRICS), **dict.fromkeys(extra)}
    whole = ({**blank, **row} for row in found)
    # Blanks are tuples, and every row gets a list of its own: a shared list would alias all rows.
    return tuple({k: list(v) if v == () else v for k, v in row.items()} for row in whole)
