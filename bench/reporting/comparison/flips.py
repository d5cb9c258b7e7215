"""Flips: samples whose score differs between two runs, and their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bench.evaluation import PlanCache
from bench.records import Metric, Record
from bench.records.files import refuse_unwritable
from bench.reporting.comparison.comparison import ComparedRun
from bench.reporting.comparison.metric_forms import metric_rows
from bench.reporting.document_images import Document, document_images

LENGTH_NORMALIZED = "acc_norm"
"""lm-eval's metric that divides the log-likelihood of a choice by its length in characters."""


if TYPE_CHECKING:
    SampleRow = pd.Series[Any]
    """One row of a frame of samples; its columns have different types."""


@dataclass(frozen=True)
class Flip:
    """One sample whose score differs between the candidate and the baseline.

    `image` is the SHA-256 of the sample's image, if any; `source` locates the document's data set.
    """

    run: str
    task: str
    document: int
    source: str | None
    image: str | None
    prompt: str | None
    target: str | None
    baseline_answer: str | None
    candidate_answer: str | None
    baseline_score: float
    candidate_score: float

    @property
    def lost(self) -> bool:
        """Whether the candidate scores lower."""
        return self.candidate_score < self.baseline_score


def find_flips(
    baseline: ComparedRun, candidate: ComparedRun, metric: Metric, limit: int
) -> list[Flip]:
    """Return up to `limit` samples that the candidate lost, and as many that it gained.

    The largest changes come first. A metric without a score per sample has no flips.
    """
    base, other = (_scored(run.samples, metric) for run in (baseline, candidate))
    if base is None or other is None or not base.index.equals(other.index):
        return []
    change = other["score"] - base["score"]
    # A stable sort keeps equal changes in document order, so that the selection is reproducible:
    # for accuracies all changes are equal.
    order = change.abs().sort_values(ascending=False, kind="stable").index
    lost = [position for position in order if change[position] < 0][:limit]
    gained = [position for position in order if change[position] > 0][:limit]
    source = (baseline.record.provenance.get("data", {}).get(metric.task) or {}).get("location")
    shown = ((base.loc[position], other.loc[position]) for position in lost + gained)
    return [_flip(candidate.record.id, metric, source, *rows) for rows in shown]


def _scored(samples: pd.DataFrame, metric: Metric) -> pd.DataFrame | None:
    """Return a metric's samples by task and document with their `score`; None without scores."""
    rows = metric_rows(samples, metric)
    # `X_mean` (POPE's mean over splits) is computed from the scores of `X` per answer.
    single = metric.metric.removesuffix("_mean")
    # A document with several rows does not have a single score that could flip.
    if single not in rows or rows.duplicated(["task", "doc_id"]).any():
        return None
    scored = rows.assign(score=rows[single].astype(float)).dropna(subset=["score"])
    return scored.set_index(["task", "doc_id"], drop=False).sort_index()


def _flip(run: str, metric: Metric, source: str | None, base: SampleRow, other: SampleRow) -> Flip:
    return Flip(
        run=run,
        task=str(base["task"]),
        document=int(base["doc_id"]),
        source=source,
        image=_text(base, "image_hash"),
        prompt=_text(base, "prompt"),
        target=_target(base),
        baseline_answer=_answer(base, metric.metric),
        candidate_answer=_answer(other, metric.metric),
        baseline_score=float(base["score"]),
        candidate_score=float(other["score"]),
    )


def _text(row: SampleRow, column: str) -> str | None:
    value = row.get(column)
    return value if isinstance(value, str) else None


def _target(row: SampleRow) -> str | None:
    """Return the correct answer; if the target is the index of a choice, return that choice."""
    target, choices = _text(row, "target"), list(row.get("choices", ()))
    # lm-eval stores the index as text. A number that is not such an index is itself the answer.
    if choices and target is not None and target.isdecimal() and int(target) < len(choices):
        return str(choices[int(target)])
    return target


def _answer(row: SampleRow, metric: str) -> str | None:
    """Return the choice with the highest log-likelihood, or the generated text or class."""
    choices = [str(choice) for choice in row.get("choices", ())]
    likelihood_C = np.asarray(row.get("loglikelihoods", ()), dtype=float)
    if choices and len(choices) == len(likelihood_C):
        if metric == LENGTH_NORMALIZED:
            likelihood_C = likelihood_C / [max(len(choice), 1) for choice in choices]
        return choices[int(likelihood_C.argmax())]
    return _text(row, "response") or _text(row, "prediction")


IMAGE_FOLDER = "pictures"
"""Folder in the results for images of flips."""


def write_flip_images(
    flips: Sequence[Flip], record: Record, results_dir: Path
) -> dict[str, list[Path]]:
    """Write the images of flips as PNG files; return the files by image hash.

    The benchmark is that of `record`. Files are named by the hash; existing ones are kept.

    Raises:
        MissingData: the benchmark's data are not on this machine and cannot be downloaded.
        UserError: see `document_images`.
    """
    # Several questions may have the same image, which is written once.
    wanted = {f.image: Document(f.task, f.document, f.image) for f in flips if f.image}
    if not wanted:
        return {}
    refuse_unwritable("--results-dir", results_dir / IMAGE_FOLDER, folder=True)
    written: dict[str, list[Path]] = {}
    found = document_images(record, list(wanted.values()), PlanCache())
    for name, document in wanted.items():
        images = found[document]
        # 64 bits of the hash suffice to distinguish the images of a results folder.
        stem = results_dir / IMAGE_FOLDER / name[:16]
        stem.parent.mkdir(parents=True, exist_ok=True)
        written[name] = [Path(f"{stem}-{number}.png") for number in range(len(images))]
        for path, image in zip(written[name], images, strict=True):
            if not path.exists():
                image.save(path)
    return written
