"""Scored samples as flat rows with the same columns for every task and harness."""

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
"""Every row's first columns and what stands in them where a task has nothing to say."""

METRICS = ("acc", "acc_norm", "exact_match")
"""The metric columns that are there whatever was run; other metrics add theirs."""


def aligned(found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Give all rows the same columns in the same order; a missing list is empty, the rest None."""
    extra = dict.fromkeys(key for row in found for key in row if key not in COLUMNS)
    blank = {**COLUMNS, **dict.fromkeys(METRICS), **dict.fromkeys(extra)}
    whole = ({**blank, **row} for row in found)
    return tuple({k: list(v) if v == () else v for k, v in row.items()} for row in whole)
