"""Choose the scored samples that a report carries, and store them compactly.

Per run and task the same evenly spaced questions are shown, whatever the answers were: a choice
that depends on the answers would make a method look better or worse than it is. So runs of one
setting share their questions, whose texts are stored once, and each answer can be shown next to the
dense model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from bench.records import Store
from bench.records.store import SAMPLES
from bench.reporting.leaderboard import Leaderboard, LeaderboardRow

QUESTION_COLUMNS = ("task", "filter", "doc_id", "target", "prompt", "choices")
ANSWER_COLUMNS = ("loglikelihoods", "response", "prediction", "probability")
NON_SCORE_COLUMNS = frozenset(
    {*QUESTION_COLUMNS, *ANSWER_COLUMNS, "doc_hash", "prompt_hash", "image_hash"}
)
RUNS_PER_CHUNK = 25
MAX_TEXT_LENGTH = 4000
"""Characters shown of a prompt or an answer; windows of perplexity tasks are longer."""


@dataclass(frozen=True)
class SampleShare:
    """Embedded samples: `per_run` samples of each of the `runs` newest runs."""

    per_run: int = 40
    runs: int = 200


def sample_chunks(board: Leaderboard, store: Store, share: SampleShare) -> Iterator[dict[str, Any]]:
    """Yield chunks of `{texts, runs}`; samples refer to texts by position.

    Dense runs are included even if they are old, since all other runs are compared with them.
    """
    newest = board.rows[: share.runs] if share.per_run else ()
    wanted = {row.record.id for row in newest} | {row.dense for row in newest}
    # By setting, because only runs of one setting share texts; the stable sort keeps the newest
    # first within a setting.
    rows = sorted((r for r in board.rows if r.record.id in wanted), key=lambda r: r.setting)
    for _, group in groupby(rows, key=lambda row: row.setting):
        for few in _batched(group, RUNS_PER_CHUNK):
            yield _sample_chunk(few, store, share.per_run)


def _batched(rows: Iterable[LeaderboardRow], size: int) -> Iterator[tuple[LeaderboardRow, ...]]:
    """Yield tuples of `size` rows; the last one may be shorter."""
    left = iter(rows)
    # itertools.batched exists from Python 3.12 on.
    while few := tuple(islice(left, size)):
        yield few


def _sample_chunk(rows: Iterable[LeaderboardRow], store: Store, per_run: int) -> dict[str, Any]:
    texts: dict[str, int] = {}

    def place(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(text[:MAX_TEXT_LENGTH], len(texts))

    runs: dict[str, Any] = {}
    for row in rows:
        total, read = read_samples(store.folder(row.record.id) / SAMPLES, per_run)
        for sample in read:
            sample["prompt"] = place(sample["prompt"])
            sample["choices"] = [place(choice) for choice in sample["choices"]]
        runs[row.record.id] = {"total": total, "samples": read}
    return {"texts": list(texts), "runs": runs}


def read_samples(path: Path, per_run: int) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of a run's samples, and about `per_run` of them, evenly spaced per task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid):
        return 0, []
    if not file.metadata.num_rows:
        return 0, []
    # Two small columns decide which rows are kept; their positions are taken from the order in the
    # file, which is that of the documents and so the same in every run of a setting.
    kinds = file.read(columns=[c for c in ("task", "filter") if c in file.schema_arrow.names])
    positions: dict[tuple[Any, ...], list[int]] = {}
    for position, kind in enumerate(zip(*kinds.to_pydict().values(), strict=True)):
        positions.setdefault(kind, []).append(position)
    # At least one sample of every task, even where that exceeds `per_run`.
    each = max(1, per_run // len(positions))
    chosen = [p for place in positions.values() for p in evenly_spaced(place, each)]
    rows = file.read().take(chosen).to_pylist()
    return file.metadata.num_rows, [_compact(row) for row in rows]


def evenly_spaced(positions: list[int], count: int) -> list[int]:
    """Return `count` of the positions, evenly spaced and starting with the first."""
    total = len(positions)
    return [positions[i * total // count] for i in range(count)] if total > count else positions


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """Keep the question, the answer and the scores of a sample."""
    answer = row.get("response")
    return {
        "task": row["task"],
        "filter": row.get("filter"),
        "doc": row.get("doc_id"),
        "prompt": row.get("prompt"),
        "target": _optional_text(row.get("target")),
        "choices": row.get("choices") or [],
        # The page shows fewer digits than that, and shorter numbers compress better.
        "logs": [round(value, 3) for value in row.get("loglikelihoods") or []],
        "answer": _optional_text(row.get("prediction") if answer is None else answer),
        "sure": row.get("probability"),
        "scores": {
            key: value
            for key, value in row.items()
            if key not in NON_SCORE_COLUMNS and isinstance(value, float)
        },
    }


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)[:MAX_TEXT_LENGTH]
