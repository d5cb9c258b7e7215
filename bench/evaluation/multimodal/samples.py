"""lmms-eval's logged samples as sample rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from bench.evaluation.multimodal.adapter import Adapter
from bench.evaluation.multimodal.building import PlannedTask
from bench.evaluation.multimodal.selection import together


def rows(planned: PlannedTask, adapter: Adapter, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per scored document; `doc_id` is its index in the whole data set."""
    return [_row(planned, adapter, sample) for sample in result["samples"][planned.name]]


def _row(planned: PlannedTask, adapter: Adapter, sample: dict[str, Any]) -> dict[str, Any]:
    asked = adapter.asked[planned.name, sample["doc_id"]]
    metrics = {name: _number(sample[name]) for name in planned.task.aggregation() if name in sample}
    return {
        "task": planned.name,
        "filter": "none",
        # The harness counts the documents it was given; with a limit these need not be the first
        # ones of the data set, and records of different limits must pair by document.
        "doc_id": planned.places[sample["doc_id"]],
        "doc_hash": _sha(json.dumps(sample["doc"], sort_keys=True, default=str)),
        "prompt_hash": _sha(asked.prompt),
        "target": _target(sample),
        "prompt": asked.prompt,
        "response": str(sample["filtered_resps"][0]),
        "image_hash": asked.image_hash,
        "category": sample["doc"].get("category"),
        "unit": together(planned.name, sample["doc"]),
        **metrics,
    }


def _target(sample: dict[str, Any]) -> str:
    """Return the reference answer; of ten annotators' answers the most frequent one.

    lmms-eval logs the word `answer` in that case, the name of a column that these data sets lack.
    """
    answers = sample["doc"].get("answers")
    if not answers:
        return str(sample["target"])
    given = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    return str(Counter(given).most_common(1)[0][0])


def _number(value: Any) -> float | None:
    """Return a sample's own score, or None if it is defined over several samples only."""
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) else None


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
