"""The scored samples that a report carries, and their compact form.

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
from typing import Any, TypedDict

from bench.records import Store
from bench.records.files import warn_once
from bench.records.index import samples_table
from bench.records.store import SAMPLES
from bench.reporting.leaderboard import Leaderboard, LeaderboardRow

QUESTION_COLUMNS = ("task", "filter", "doc_id", "target", "prompt", "choices")
ANSWER_COLUMNS = (
    "loglikelihoods", "response", "generations", "prediction", "probability", "tied_choices",
    "truncated_tokens",
)  # fmt: skip
NON_SCORE_COLUMNS = frozenset(
    {*QUESTION_COLUMNS, *ANSWER_COLUMNS, "doc_hash", "prompt_hash", "image_hash"}
)
RUNS_PER_CHUNK = 25
SampleRow = dict[str, Any]
"""A row of `samples.parquet`; metrics add columns of their own to the common ones."""
MAX_TEXT_LENGTH = 4000
"""Characters shown of a prompt or an answer; windows of perplexity tasks are longer."""


@dataclass(frozen=True)
class SampleShare:
    """Embedded samples: `per_run` samples of each of the `runs` newest runs."""

    per_run: int = 40
    runs: int = 200


class SampleEntry(TypedDict):
    """One sample as the page reads it; `prompt` and `choices` are positions in `texts`."""

    task: str
    filter: str | None
    doc: int | None
    prompt: int | None
    target: str | None
    choices: list[int | None]
    logs: list[float]
    answer: str | None
    raw: str | None
    tied: int | None
    cut: int | None
    sure: float | None
    scores: dict[str, float]


class RunSamples(TypedDict):
    """The number of all samples of a run, and those that the report carries."""

    total: int
    samples: list[SampleEntry]


class SampleChunk(TypedDict):
    """Samples of some runs by run id, and the texts that they share."""

    texts: list[str]
    runs: dict[str, RunSamples]


def sample_chunks(
    leaderboard: Leaderboard, store: Store, share: SampleShare
) -> Iterator[SampleChunk]:
    """Yield the samples of the newest runs in chunks that are unpacked together.

    Dense runs are included even if they are old, since all other runs are compared with them.
    """
    newest = leaderboard.rows[: share.runs] if share.per_run else ()
    wanted = {row.record.id for row in newest} | {row.dense for row in newest}
    # By setting, because only runs of one setting share texts; the stable sort keeps the newest
    # first within a setting.
    rows = sorted((r for r in leaderboard.rows if r.record.id in wanted), key=lambda r: r.setting)
    for _, group in groupby(rows, key=lambda row: row.setting):
        for batch in _batched(group, RUNS_PER_CHUNK):
            yield _sample_chunk(batch, store, share.per_run)


def _batched(rows: Iterable[LeaderboardRow], size: int) -> Iterator[tuple[LeaderboardRow, ...]]:
    """Yield tuples of `size` rows; the last one may be shorter."""
    left = iter(rows)
    # itertools.batched exists from Python 3.12 on.
    while batch := tuple(islice(left, size)):
        yield batch


def _sample_chunk(rows: Iterable[LeaderboardRow], store: Store, per_run: int) -> SampleChunk:
    texts: dict[str, int] = {}
    runs: dict[str, RunSamples] = {}
    for row in rows:
        total, samples = read_samples(store.folder(row.record.id) / SAMPLES, per_run)
        entries = [_sample_entry(sample, texts) for sample in samples]
        runs[row.record.id] = {"total": total, "samples": entries}
    return {"texts": list(texts), "runs": runs}


def read_samples(path: Path, per_run: int) -> tuple[int, list[SampleRow]]:
    """Return the number of a run's samples, and about `per_run` of them, evenly spaced per task."""
    try:
        table = samples_table(path)
    except FileNotFoundError:
        return 0, []
    except (OSError, ValueError) as error:
        warn_once(path, error)
        return 0, []
    if not table.num_rows:
        return 0, []
    # Two small columns decide which rows are kept; their positions are taken from the order in the
    # file, which is that of the documents and so the same in every run of a setting.
    kinds = table.select([c for c in ("task", "filter") if c in table.column_names])
    positions: dict[tuple[str | None, ...], list[int]] = {}
    for position, kind in enumerate(zip(*kinds.to_pydict().values(), strict=True)):
        positions.setdefault(kind, []).append(position)
    # At least one sample of every task, even where that exceeds `per_run`.
    per_task = max(1, per_run // len(positions))
    chosen = [p for group in positions.values() for p in evenly_spaced(group, per_task)]
    return table.num_rows, table.take(chosen).to_pylist()


def evenly_spaced(positions: list[int], count: int) -> list[int]:
    """Return `count` of the positions, evenly spaced and starting with the first."""
    total = len(positions)
    return [positions[i * total // count] for i in range(count)] if total > count else positions


def _sample_entry(row: SampleRow, texts: dict[str, int]) -> SampleEntry:
    """Keep the question, the answer and the scores of a sample; add its texts to `texts`."""

    def position(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(text[:MAX_TEXT_LENGTH], len(texts))

    answer = row.get("response")
    return {
        "task": row["task"],
        "filter": row.get("filter"),
        "doc": row.get("doc_id"),
        "prompt": position(row.get("prompt")),
        "target": _optional_text(row.get("target")),
        "choices": [position(choice) for choice in row.get("choices") or []],
        # The page shows fewer digits than that, and shorter numbers compress better.
        "logs": [round(value, 3) for value in row.get("loglikelihoods") or []],
        "answer": _optional_text(row.get("prediction") if answer is None else answer),
        "raw": _raw_text(row),
        "tied": row.get("tied_choices"),
        "cut": row.get("truncated_tokens"),
        "sure": row.get("probability"),
        "scores": {
            key: value
            for key, value in row.items()
            if key not in NON_SCORE_COLUMNS and isinstance(value, float)
        },
    }


def _raw_text(row: SampleRow) -> str | None:
    """Return what the model wrote, if a filter made something else of it."""
    written = row.get("generations") or []
    return _optional_text(written[0]) if written and written[0] != row.get("response") else None


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)[:MAX_TEXT_LENGTH]
