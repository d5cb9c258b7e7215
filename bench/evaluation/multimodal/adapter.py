"""An already loaded, possibly compressed vision-language model as lmms-eval's model.

Prompts and answers are those of the harness's own adapters for single images. What differs is
cost: real batches, rows that stop by themselves, images that are encoded once, and with the shared
engine one prefill for all questions of a batch about an image.
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
from bench.evaluation.batches import Batches
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.engine import Asked, Engine
from bench.evaluation.memory import Memory, key
from bench.evaluation.multimodal import beginnings
from bench.evaluation.multimodal.features import Features
from bench.evaluation.multimodal.generation import Answer, Generation, Question
from bench.evaluation.multimodal.prompts import Prompts, image_hash
from bench.models.model import Model
from bench.progress import Progress


class Adapter(lmms):  # type: ignore[misc]  # the harness has no types
    """Answers the harness's requests with a `Model`; `engine` says by which engine.

    Questions about the same images are asked one after the other, so that their features are found
    in a small memory and their prefill is shared. `asked` keeps the whole prompt and the answer by
    task and document.
    """

    def __init__(
        self,
        model: Model,
        benchmark: BenchmarkConfig,
        progress: Progress,
        memory: Memory | None = None,
    ) -> None:
        super().__init__()
        if model.processor is None:
            raise UserError(f"model {model.name} has no processor, which questions on images need")
        model.network.eval()
        system = benchmark.system_prompt
        self.asked: dict[tuple[str, int], Answer] = {}
        self.engine = _engine(model, benchmark.engine, progress)
        self._memory = memory or Memory()
        self._model = model
        self._progress = progress
        self._prompts = Prompts(model, model.config.system_prompt if system is None else system)
        self._features = Features(model, int(benchmark.image_cache_gib * 2**30))
        self._batches = Batches(benchmark.batch_size, model.device, progress)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return one answer per request; requests of equal settings share batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        texts = [""] * len(requests)
        shares = self.engine.used == "shared"
        for found in groups.values():
            numbers = self._by_image(requests, found) if shares else found
            options = requests[numbers[0]].args[1]
            generation = Generation(self._model, self._prompts, self._features, options, shares)
            answers = self._memory.batched(
                [_key(requests[number]) for number in numbers],
                [self._question(requests[number]) for number in numbers],
                [1] * len(numbers),
                self._batches,
                partial(_answer, generation),
                self._progress,
            )
            for number, fields in zip(numbers, answers, strict=True):
                *_, document, task, _split = requests[number].args
                answer = self.asked[task, document] = Answer(*fields)
                texts[number] = answer.text
        return texts

    def clean(self) -> None:
        """Keep everything: the harness calls this after each task, and the run owns the model.

        The harness's own would collect Python's garbage, a third of a second each time.
        """

    def _question(self, request: Instance) -> Question:
        text, _, doc_to_visual, document, task, split = request.args
        return Question(text, partial(self._open, doc_to_visual, document, task, split))

    def _by_image(self, requests: list[Instance], numbers: list[int]) -> list[int]:
        """Bring questions about the same images together, in the order of the first of them.

        This opens every image once more than answering does, and keeps none.
        """
        together: dict[str, list[int]] = defaultdict(list)
        for number in numbers:
            together[image_hash(self._question(requests[number]).open_images())].append(number)
        return [number for alike in together.values() for number in alike]

    def _open(self, doc_to_visual: Any, document: int, task: str, split: str) -> list[Any]:
        return list(doc_to_visual(self.task_dict[task][split][document]))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: planning lets only tasks of generated answers through."""
        raise UserError(f"{requests[0].task_name} scores given answers, which is not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: planning lets only tasks of one question through."""
        raise UserError(f"{requests[0].task_name} asks in several rounds, which is not supported")


def _answer(generation: Generation, questions: Sequence[Question]) -> list[list[str | None]]:
    """Return answers in the plain form that a memory keeps."""
    return [list(astuple(answer)) for answer in generation.run(questions)]


def _key(request: Instance) -> str:
    """Name a request; which images a document has is said by the fingerprint of its data set."""
    text, options, _, document, task, split = request.args
    return key("question", task, split, document, text, options)


def _engine(model: Model, wanted: Engine, progress: Progress) -> Asked:
    """Return which engine a model is asked by: the one that is wanted, unless it cannot be."""
    asked = Asked(wanted)
    reason = beginnings.unfit(model) if wanted == "shared" else None
    if reason is not None:
        asked.because(reason)
        progress.console.print(f"[yellow]{model.name} is asked by the plain engine: {reason}[/]")
    elif wanted == "shared":
        asked.used = "shared"
    return asked
