"""Scored samples in a report, and their compact form.

The same evenly spaced questions are shown for every run of a task, independent of the answers: a
selection by answers would make a method look better or worse. So runs of a setting share their
questions, whose texts are stored once, and each answer can be shown beside the dense model's.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np

from bench.errors import UserError
from bench.evaluation import PlanCache
from bench.records import Record, Store
from bench.records.files import warn_once
from bench.records.index import samples_table
from bench.records.store import SAMPLES
from bench.reporting.document_images import Document, document_images
from bench.reporting.leaderboard import Leaderboard, LeaderboardRow

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

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
"""A row of `samples.parquet`; metrics add columns to the common ones."""
MAX_TEXT_LENGTH = 4000
"""Maximum number of characters of a prompt or an answer; perplexity windows are longer."""


@dataclass(frozen=True)
class SampleShare:
    """Size of the embedded samples: `per_run` samples of each of the `runs` newest runs.

    `images` adds thumbnails of their questions' images.
    """

    per_run: int = 40
    runs: int = 200
    images: bool = False


class SampleEntry(TypedDict):
    """One sample as the page reads it.

    `prompt` and `choices` are indices into the chunk's `texts`, `images` into its `images`.
    """

    task: str
    filter: str | None
    doc: int | None
    prompt: int | None
    target: str | None
    choices: list[int | None]
    images: list[int]
    logs: list[float]
    answer: str | None
    raw: str | None
    tied: int | None
    cut: int | None
    sure: float | None
    scores: dict[str, float]


PackedOutcomes = tuple[str, int, str]
"""Right and wrong answers of a task: a digest of its questions, their number, and one bit each."""


class RunSamples(TypedDict):
    """Number of all samples of a run, the samples in the report, and all outcomes."""

    total: int
    samples: list[SampleEntry]
    outcomes: dict[str, PackedOutcomes]


class SampleChunk(TypedDict):
    """Samples of some runs by run id, with shared texts and images (data URIs).

    `no_images` is the reason why requested images are missing.
    """

    texts: list[str]
    images: list[str]
    no_images: str | None
    runs: dict[str, RunSamples]


def sample_chunks(
    leaderboard: Leaderboard, store: Store, share: SampleShare
) -> Iterator[SampleChunk]:
    """Yield the samples of the newest runs, in chunks that are unpacked together.

    Dense runs are included even if they are old, because other runs are compared with them.
    """
    newest = leaderboard.rows[: share.runs] if share.per_run else ()
    wanted = {row.record.id for row in newest} | {row.dense for row in newest}
    # Sorted by setting, because only runs of one setting share texts; the stable sort keeps the
    # newest first within a setting.
    rows = sorted((r for r in leaderboard.rows if r.record.id in wanted), key=lambda r: r.setting)
    plans = PlanCache() if share.images else None
    for _, group in groupby(rows, key=lambda row: row.setting):
        for batch in _batched(group, RUNS_PER_CHUNK):
            yield _sample_chunk(batch, store, share.per_run, plans)


def _batched(rows: Iterable[LeaderboardRow], size: int) -> Iterator[tuple[LeaderboardRow, ...]]:
    """Yield tuples of `size` rows; the last one may be shorter."""
    left = iter(rows)
    # `itertools.batched` requires Python 3.12.
    while batch := tuple(islice(left, size)):
        yield batch


def _sample_chunk(
    rows: Sequence[LeaderboardRow], store: Store, per_run: int, plans: PlanCache | None
) -> SampleChunk:
    """Return the samples of some runs; with `plans`, also the images of their questions."""
    chosen: dict[str, list[SampleRow]] = {}
    runs: dict[str, RunSamples] = {}
    for row in rows:
        run = row.record.id
        table = readable_table(store.folder(run) / SAMPLES)
        chosen[run] = chosen_samples(table, per_run)
        runs[run] = {
            "total": 0 if table is None else table.num_rows,
            "samples": [],
            "outcomes": {} if table is None else packed_outcomes(table, row.record),
        }
    seen: Thumbnails = {}
    reason = None
    if plans is not None:
        # Runs of a setting have the same questions, so any of their records identifies the
        # benchmark.
        seen, reason = thumbnails(rows[0].record, chain(*chosen.values()), plans)
    texts: dict[str, int] = {}
    images: dict[str, int] = {}
    for run, samples in chosen.items():
        runs[run]["samples"] = [_sample_entry(sample, texts, images, seen) for sample in samples]
    return {"texts": list(texts), "images": list(images), "no_images": reason, "runs": runs}


Thumbnails: TypeAlias = "dict[tuple[str, int], list[str]]"
"""Images by task and document, as data URIs."""
THUMBNAIL_SIDE = 240
"""Pixels of a thumbnail's longer side; smaller images are not changed."""


def thumbnails(
    record: Record, rows: Iterable[SampleRow], plans: PlanCache
) -> tuple[Thumbnails, str | None]:
    """Return small images of the questions, or the reason if there are none.

    The benchmark's data may be unavailable on this machine, which must not prevent the report.
    """
    # Rows of a classifier have no hash, but each of them has an image.
    classified = record.config["benchmark"].get("harness") == "images"
    documents = (Document(row["task"], row["doc_id"], row.get("image_hash")) for row in rows)
    wanted = dict.fromkeys(each for each in documents if each.image_hash or classified)
    try:
        found = document_images(record, wanted, plans)
    except UserError as error:
        return {}, str(error)
    return {
        (document.task, document.number): list(map(_data_uri, images))
        for document, images in found.items()
    }, None


def _data_uri(image: Image) -> str:
    """Return a small image unchanged, or a reduced copy of a large one."""
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(image).convert("RGB")
    kind = "png"
    if max(shown.size) > THUMBNAIL_SIDE:
        shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        kind = "jpeg"
    out = io.BytesIO()
    shown.save(out, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def readable_table(path: Path) -> pa.Table | None:
    """Return a run's samples; None if there are none, with a warning if the file is not readable.

    A run without samples has a file without rows.
    """
    try:
        table = samples_table(path)
    except (OSError, ValueError) as error:
        warn_once(path, error, path.parents[1])
        return None
    return table if table.num_rows else None


def chosen_samples(table: pa.Table | None, per_run: int) -> list[SampleRow]:
    """Return about `per_run` of a run's samples, evenly spaced per task."""
    if table is None:
        return []
    # Only two small columns are read to select rows. Positions follow the order in the file, which
    # is that of the documents and the same in every run of a setting.
    positions = _positions(table)
    # At least one sample of every task, even if there are more tasks than `per_run`.
    per_task = max(1, per_run // len(positions))
    chosen = [p for group in positions.values() for p in evenly_spaced(group, per_task)]
    rows: list[SampleRow] = table.take(chosen).to_pylist()
    return rows


def _positions(table: pa.Table) -> dict[tuple[str | None, ...], list[int]]:
    """Return the rows of each task and filter."""
    kinds = table.select([c for c in ("task", "filter") if c in table.column_names])
    positions: dict[tuple[str | None, ...], list[int]] = {}
    for position, kind in enumerate(zip(*kinds.to_pydict().values(), strict=True)):
        positions.setdefault(kind, []).append(position)
    return positions


def packed_outcomes(table: pa.Table, record: Record) -> dict[str, PackedOutcomes]:
    """Return the outcomes of every headline metric that is a mean of right and wrong answers.

    As in `bench compare`, outcomes count only if their mean is the number in the record. With them
    the page can pair any two runs over the same questions.
    """
    found: dict[str, PackedOutcomes] = {}
    positions = _positions(table)
    for metric in record.metrics:
        if not metric.headline or metric.missing or metric.metric not in table.column_names:
            continue
        kinds = [(metric.task, metric.filter), (metric.task, None), (metric.task,)]
        rows = next((positions[kind] for kind in kinds if kind in positions), None)
        if rows is None or metric.value is None:
            continue
        scores = table[metric.metric].take(rows).to_pylist()
        if not set(scores) <= {0.0, 1.0} or abs(sum(scores) / len(rows) - metric.value) > 1e-9:
            continue
        digest = hashlib.sha256()
        # The condition for pairs in `bench compare`: the same documents and the same prompts.
        for name in ("doc_id", "doc_hash", "prompt_hash"):
            if name in table.column_names:
                digest.update(repr(table[name].take(rows).to_pylist()).encode())
        bits = np.packbits(np.array(scores, dtype=bool)).tobytes()
        found[metric.task] = (digest.hexdigest()[:12], len(rows), base64.b64encode(bits).decode())
    return found


def evenly_spaced(positions: list[int], count: int) -> list[int]:
    """Return `count` of the positions, evenly spaced and starting with the first."""
    total = len(positions)
    return [positions[i * total // count] for i in range(count)] if total > count else positions


def _sample_entry(
    row: SampleRow, texts: dict[str, int], images: dict[str, int], seen: Thumbnails
) -> SampleEntry:
    """Return the question, the answer and the scores of a sample.

    Its texts are added to `texts`, and its images among `seen` to `images`.
    """

    def position(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(text[:MAX_TEXT_LENGTH], len(texts))

    answer = row.get("response")
    pictures = seen.get((row["task"], row.get("doc_id", -1)), ())
    return {
        "task": row["task"],
        "filter": row.get("filter"),
        "doc": row.get("doc_id"),
        "prompt": position(row.get("prompt")),
        "target": _optional_text(row.get("target")),
        "choices": [position(choice) for choice in row.get("choices") or []],
        # Several questions may have the same image.
        "images": [images.setdefault(uri, len(images)) for uri in pictures],
        # The page shows fewer digits, and shorter numbers compress better.
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
    """Return the model's output if a filter changed it, else None."""
    written = row.get("generations") or []
    return _optional_text(written[0]) if written and written[0] != row.get("response") else None


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)[:MAX_TEXT_LENGTH]
