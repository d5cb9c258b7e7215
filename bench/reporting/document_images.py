"""Images of questions, loaded again from a run's benchmark and checked against the run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PlanCache
from bench.records import Record

if TYPE_CHECKING:
    from PIL.Image import Image

    from bench.evaluation.benchmark import PlannedBenchmark


class Document(NamedTuple):
    """One document of a task, and the SHA-256 of its images if the run recorded it."""

    task: str
    number: int
    image_hash: str | None


def document_images(
    record: Record, documents: Collection[Document], plans: PlanCache
) -> dict[Document, Sequence[Image]]:
    """Return the images of documents of a run's benchmark; `plans` caches its data.

    Without a recorded hash of the images, the fingerprint of the whole data set must match.

    Raises:
        MissingData: the benchmark's data are not on this machine and cannot be downloaded.
        UserError: the images of a document have changed since the run, the benchmark's tasks
            have their own code, or its settings are damaged.
    """
    if not documents:
        return {}
    # A record must not allow code to run; see `bench.runner.replay.recorded_config`.
    stored = {**record.config["benchmark"], "trust_code": False}
    try:
        benchmark = BenchmarkConfig.model_validate(stored)
    except ValidationError:
        raise UserError(f"the benchmark settings of run {record.id} are damaged") from None
    plan = plans.plan(benchmark, offline=bool(record.config.get("offline")))
    return {document: _checked_images(record, document, plan) for document in documents}


def _checked_images(record: Record, document: Document, plan: PlannedBenchmark) -> Sequence[Image]:
    task, number, expected = document
    images = plan.harness.images(task, number)
    if expected is None:
        data = record.provenance.get("data", {}).get(task) or {}
        same = data.get("fingerprint") == plan.fingerprints.get(task)
    else:
        # Imported here, because it imports transformers, which other comparisons do not need.
        from bench.evaluation.multimodal.prompts import image_hash

        same = image_hash(images) == expected
    if not same:
        raise UserError(
            f"the images of {task} document {number} differ from the run's: the data have changed "
            "since the run"
        )
    return images
