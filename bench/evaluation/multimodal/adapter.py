"""A loaded, possibly compressed vision-language model as lmms-eval's model.

Prompts and answers are those of lmms-eval's own adapters for single images. Only the cost differs:
real batches, rows that stop individually, images that are encoded once, and with prefix sharing one
prefill for all questions of a batch about the same image.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from bench.errors import UserError
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import BackendReport
from bench.evaluation.multimodal import shared_prefix
from bench.evaluation.multimodal.generation import Answer, Generation, ImageQuestion
from bench.evaluation.multimodal.prompts import PromptEncoder, VisionFeatureCache, image_hash
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.model import Model
from bench.schema import Backend, BenchmarkConfig
from bench.ui import Progress


class LmmsEvalAdapter(lmms):  # type: ignore[misc]  # the harness has no types
    """Serves the harness's requests with a `Model`; `backend_report` names the backend.

    Questions about the same images are answered one after the other, so that a small cache holds
    their features and their prefill is shared. `answers_by_document` maps (task, document) to the
    full prompt and the answer.
    """

    def __init__(
        self,
        model: Model,
        benchmark: BenchmarkConfig,
        progress: Progress,
        memory: ResponseCache | None = None,
    ) -> None:
        super().__init__()
        if model.processor is None:
            raise UserError(
                f"model {model.name} has no processor, which questions about images require"
            )
        model.network.eval()
        system = benchmark.system_prompt
        self.answers_by_document: dict[tuple[str, int], Answer] = {}
        self.backend_report = _select_backend(model, benchmark.backend, progress)
        self._memory = memory or ResponseCache()
        self._model = model
        self._progress = progress
        self._prompts = PromptEncoder(
            model, model.config.system_prompt if system is None else system
        )
        self._features = VisionFeatureCache(model, int(benchmark.image_cache_gib * 2**30))
        self._batches = AdaptiveBatches(benchmark.batch_size, model.device, progress)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return one answer per request; requests with equal settings share batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        texts = [""] * len(requests)
        shares = self.backend_report.used == "prefix_sharing"
        for found in groups.values():
            numbers = self._by_image(requests, found) if shares else found
            options = requests[numbers[0]].args[1]
            generation = Generation(self._model, self._prompts, self._features, options, shares)
            answers = self._memory.batched(
                [_request_key(requests[number]) for number in numbers],
                [self._question(requests[number]) for number in numbers],
                [1] * len(numbers),
                self._batches,
                partial(_answer_fields, generation),
                self._progress,
            )
            for number, fields in zip(numbers, answers, strict=True):
                *_, document, task, _split = requests[number].args
                answer = self.answers_by_document[task, document] = Answer(*fields)
                texts[number] = answer.text
        return texts

    def clean(self) -> None:
        """Keep everything: the harness calls this after each task, but the run owns the model.

        The base class collects Python's garbage, which takes a third of a second each time.
        """

    def _question(self, request: Instance) -> ImageQuestion:
        text, _, doc_to_visual, document, task, split = request.args
        # Images are opened late: the decoded images of a whole task may exceed the memory.
        return ImageQuestion(text, partial(self._open, doc_to_visual, document, task, split))

    def _by_image(self, requests: list[Instance], numbers: list[int]) -> list[int]:
        """Group questions about the same images, in the order of the first question of each group.

        This opens every image once more than answering does, and keeps none.
        """
        together: dict[str, list[int]] = defaultdict(list)
        for number in numbers:
            # Equal pixels, not equal document ids: data sets repeat one image in many documents.
            together[image_hash(self._question(requests[number]).open_images())].append(number)
        return [number for alike in together.values() for number in alike]

    def _open(self, doc_to_visual: Any, document: int, task: str, split: str) -> list[Any]:
        return list(doc_to_visual(self.task_dict[task][split][document]))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise: planning admits only generate_until tasks."""
        raise UserError(
            f"{requests[0].task_name} is a loglikelihood task; only generate_until is supported"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise: planning admits only single-turn tasks."""
        raise UserError(
            f"{requests[0].task_name} is a multi-turn task; only single-turn tasks are supported"
        )


def _answer_fields(
    generation: Generation, questions: Sequence[ImageQuestion]
) -> list[list[str | None]]:
    """Return answers as JSON values, the form that the response cache stores."""
    return [list(astuple(answer)) for answer in generation.run(questions)]


def _request_key(request: Instance) -> str:
    """Name a request; the fingerprint of its data set covers the images of the document."""
    text, options, _, document, task, split = request.args
    return request_key("question", task, split, document, text, options)


def _select_backend(model: Model, requested: Backend, progress: Progress) -> BackendReport:
    """Return the backend report for a model: the requested backend, unless it is not supported."""
    asked = BackendReport(requested)
    reason = shared_prefix.unsupported_reason(model) if requested == "prefix_sharing" else None
    if reason is not None:
        asked.add_reason(reason)
        progress.console.print(f"[yellow]{model.name} uses the padded backend: {reason}[/]")
    elif requested == "prefix_sharing":
        asked.used = "prefix_sharing"
    return asked
