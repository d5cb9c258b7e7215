"""Images of questions, found again in the benchmark of a run and checked against it."""

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
    """One document of a task, and the SHA-256 of its images if the run has stored it."""

    task: str
    number: int
    image_hash: str | None


def document_images(
    record: Record, documents: Collection[Document], plans: PlanCache
) -> dict[Document, Sequence[Image]]:
    """Return the images of documents of a run's benchmark; `plans` keeps its data.

    Without a hash of the images, the fingerprint of the whole data set must be that of the run.

    Raises:
        MissingData: the benchmark's data are not on this machine and cannot be downloaded.
        UserError: the images of a document differ from those of the run, the benchmark's tasks
            bring code of their own, or its settings are damaged.
    """
    if not documents:
        return {}
    # No record can allow code to run, see `bench.runner.replay.recorded_config`.
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
        # Here, since it imports transformers, for which no other comparison need wait.
        from bench.evaluation.multimodal.prompts import image_hash

        same = image_hash(images) == expected
    if not same:
        raise UserError(
            f"the images of {task} document {number} differ from the run's: the data have changed "
            "since the run"
        )
    return images
