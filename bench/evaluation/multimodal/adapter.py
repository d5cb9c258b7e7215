"""lmms-eval's interface to a loaded, possibly compressed vision-language model or stored answers.

Prompts and answers are those of lmms-eval's own adapters for single images, at a lower cost: real
batches, rows that stop individually, images that are encoded once, and with prefix sharing a single
prefill for all questions of a batch about the same image.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL.Image import Image

from bench.data.image_files import UnfitImage
from bench.errors import UserError
from bench.evaluation.batching import MAX_AUTO_IMAGES, AdaptiveBatches
from bench.evaluation.evidence import EvidenceLog, Seen
from bench.evaluation.harness import select_backend
from bench.evaluation.metrics import SampleRow
from bench.evaluation.multimodal import shared_prefix
from bench.evaluation.multimodal.generation import Answer, Generation, ImageQuestion
from bench.evaluation.multimodal.planned_tasks import PlannedTask
from bench.evaluation.multimodal.prompts import PromptEncoder, VisionFeatureCache, image_hash
from bench.evaluation.multimodal.task_data import (
    DocToParts,
    DocToVisual,
    open_document_images,
    open_document_parts,
)
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.model import Model
from bench.schema import BenchmarkConfig
from bench.ui import Progress


class LmmsEvalAdapter(lmms):  # type: ignore[misc]  # the harness has no types
    """Serves the harness's requests with a `Model`; `backend_report` names the backend.

    Questions about the same images are answered consecutively, so that a small cache can hold
    their features and their prefill is shared. `answers_by_document` maps (task, document) to the
    full prompt and the answer, `evidence` to facts about the model's input. `doc_to_parts` has the
    functions of tasks with images between their texts.
    """

    def __init__(
        self,
        model: Model,
        benchmark: BenchmarkConfig,
        progress: Progress,
        cache: ResponseCache | None = None,
    ) -> None:
        super().__init__()
        if model.processor is None:
            raise UserError(
                f"model {model.name} has no processor, which questions about images require"
            )
        model.network.eval()
        self.answers_by_document: dict[tuple[str, int], Answer] = {}
        self.doc_to_parts: dict[str, DocToParts] = {}
        self.evidence = EvidenceLog()
        self._overlong = benchmark.overlong
        self.backend_report = select_backend(
            model, benchmark.backend, shared_prefix.unsupported_reason(model), progress
        )
        self._cache = cache or ResponseCache()
        self._model = model
        self._progress = progress
        own, replaced = model.config.system_prompt, benchmark.system_prompt
        self._prompts = PromptEncoder(model, own if replaced is None else replaced)
        self._features = VisionFeatureCache(model, int(benchmark.image_cache_gib * 2**30))
        size = MAX_AUTO_IMAGES if benchmark.batch_size == "auto" else benchmark.batch_size
        self._batches = AdaptiveBatches(size, model.device, progress)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return one answer per request; requests with equal settings share batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        texts = [""] * len(requests)
        shares = self.backend_report.used == "prefix_sharing"
        for group in groups.values():
            indices = self._by_image(requests, group) if shares else group
            options = requests[indices[0]].args[1]
            generation = Generation(
                self._model, self._prompts, self._features, options, shares, self._overlong
            )
            responses = self._cache.get_or_compute_batched(
                [_request_key(requests[index]) for index in indices],
                [self._question(requests[index]) for index in indices],
                [1] * len(indices),
                self._batches,
                partial(_answer_fields, generation),
                self._progress,
            )
            for index, fields in zip(indices, responses, strict=True):
                *_, document, task, _split = requests[index].args
                answer = _answer_of(fields)
                self.answers_by_document[task, document] = answer
                self.evidence.requests[task, document].append(answer.seen)
                self.evidence.settings[task] = generation.in_force
                texts[index] = answer.text or ""  # The harness's filters accept only strings.
        return texts

    def clean(self) -> None:
        """Do nothing: the harness calls this after each task, but the run owns the model.

        The base class collects garbage, which takes a third of a second each time.
        """

    def _question(self, request: Instance) -> ImageQuestion:
        text, _, doc_to_visual, document, task, split = request.args
        # Images are opened late, because all decoded images of a task may exceed the memory.
        opening = partial(self._open, doc_to_visual, document, task, split)
        name = f"task {task}, document {document}"
        doc_to_parts = self.doc_to_parts.get(task)
        if doc_to_parts is None:
            return ImageQuestion(text, opening, name)
        parts = partial(open_document_parts, doc_to_parts, self.task_dict[task][split], document)
        return ImageQuestion(text, lambda: _images_of(parts()), name, parts)

    def _by_image(self, requests: list[Instance], indices: list[int]) -> list[int]:
        """Group questions about the same images, in the order of the first question of each group.

        Every image is opened here and again for answering, because keeping all needs too much
        memory.
        """
        same_images: dict[str, list[int]] = defaultdict(list)
        for index in indices:
            # By pixels instead of document ids, because many documents may have the same image.
            try:
                key = image_hash(self._question(requests[index]).open_images())
            except UnfitImage:
                key = ""  # Answering fails in the same way and records the reason.
            same_images[key].append(index)
        return [index for group in same_images.values() for index in group]

    def _open(
        self, doc_to_visual: DocToVisual, document: int, task: str, split: str
    ) -> list[Image]:
        return open_document_images(doc_to_visual, self.task_dict[task][split], document)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise, because planning accepts only generate_until tasks."""
        raise UserError(
            f"{requests[0].task_name} is a loglikelihood task; only generate_until is supported"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise, because planning accepts only single-turn tasks."""
        raise UserError(
            f"{requests[0].task_name} is a multi-turn task; only single-turn tasks are supported"
        )


class StoredAnswers(lmms):  # type: ignore[misc]  # the harness has no types
    """Answers the harness's requests from the answers in sample rows."""

    def __init__(self, tasks: Sequence[PlannedTask], rows: Sequence[SampleRow]) -> None:
        super().__init__()
        self.answers_by_document: dict[tuple[str, int], Answer] = {}
        self.doc_to_parts: dict[str, DocToParts] = {}  # Not used, because no image is opened.
        self.evidence = EvidenceLog()
        self._indices = {task.name: task.indices for task in tasks}
        self._rows = {(row["task"], row["doc_id"]): row for row in rows}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the texts before any filter."""
        texts = []
        for request in requests:
            *_, document, task, _split = request.args
            index = self._indices[task][document]
            row = self._rows.get((task, index), {})
            missing, stored = row.get("missing"), row.get("generations")
            if missing is None and not stored:
                raise UserError(
                    f"task {task}, document {index}: the run stored no generations, so it cannot "
                    "be scored again without the model"
                )
            text = stored[0] if stored else None
            answer = Answer(text, row["prompt"], row["image_hash"], Seen(0, 0, unanswered=missing))
            self.answers_by_document[task, document] = answer
            texts.append(text or "")
        return texts

    loglikelihood = LmmsEvalAdapter.loglikelihood
    generate_until_multi_round = LmmsEvalAdapter.generate_until_multi_round


def _images_of(parts: Sequence[str | Image]) -> list[Image]:
    return [part for part in parts if not isinstance(part, str)]


def _answer_fields(generation: Generation, questions: Sequence[ImageQuestion]) -> list[list[Any]]:
    """Return answers as JSON values, the form in which the response cache stores them."""
    return [
        [answer.text, answer.prompt, answer.image_hash, asdict(answer.seen)]
        for answer in generation.run(questions)
    ]


def _answer_of(fields: Sequence[Any]) -> Answer:
    """Return the answer with these fields."""
    text, prompt, hashed, seen = fields
    return Answer(text, prompt, hashed, Seen(**{**seen, "image_sizes": tuple(seen["image_sizes"])}))


def _request_key(request: Instance) -> str:
    """Return the key of a request; its data set's fingerprint covers the document's images."""
    text, options, _, document, task, split = request.args
    return request_key("question", task, split, document, text, options)
