"""How much faster requests are scored than by lm-eval's own `hf`, same weights, same requests.

The token saving is how many times fewer tokens a trie of a task's inputs has than the distinct
inputs that `hf` sends, which answers choices of one token together. Speed is to follow it.

On one core all of it takes an hour: `text_scoring:dense,arc_easy,zero` measures one piece. Words
are the kinds of model, the tasks and the shots; what is not given is all of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch

from bench.evaluation.task_planning import quiet_lm_eval
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest, Loglikelihoods
from bench.models.model import Model
from bench.ui import SILENT
from tests.performance import random_models, timed_tasks
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

ROUNDS = 3
SHOTS = {"zero": 0, "five": 5}
DOCUMENTS = {"zero": 40, "five": 6}
"""The first so many documents of a task are asked about."""
BATCH_SIZES = (1, 4, 16, 64)
TOLERANCE = 1e-4


def figures(*words: str) -> list[Figure]:
    """Speed-up over token saving for each task, zero-shot; the speed-up itself with five shots."""
    torch.set_num_threads(1)
    kinds, names, shots = _chosen(words)
    everything = {
        name: timed_tasks.requests(timed_tasks.task(name), None) for name in timed_tasks.names()
    }
    spoken = random_models.tokenizer(
        t for asked in everything.values() for t in timed_tasks.texts(asked)
    )
    found = []
    for kind in kinds:
        model = random_models.build(kind, spoken)
        found += [_figure(model, name, each) for name in names for each in shots]
    return found


def _chosen(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the kinds, the tasks and the shots that some words choose."""
    offered = [list(random_models.CONFIGS), timed_tasks.names(), list(SHOTS)]
    known = [word for each in offered for word in each]
    unknown = set(words).difference(known)
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    for each in offered:
        yield [word for word in each if word in words] or each


def _figure(model: Model, name: str, shots: str) -> Figure:
    asked = timed_tasks.requests(timed_tasks.task(name, SHOTS[shots]), DOCUMENTS[shots])
    speed, saving, how = measure(model, asked)
    label = f"{model.name}, {name}, {shots}-shot"
    how = f"{speed:.2f} times faster, {saving:.2f} times fewer tokens; {how}"
    how += f"; the first {DOCUMENTS[shots]} documents"
    value = speed / saving
    return Figure(f"{label}: speed-up over saving", value, ">= 1", value >= 1, how)


def measure(model: Model, asked: Sequence[Any]) -> tuple[float, float, str]:
    """Return speed-up, token saving and how they were had; answers are compared on the way."""
    few = asked[: len(asked) // 4]
    size = min(BATCH_SIZES, key=lambda size: _seconds(reference(model, size), few))
    theirs, ours = reference(model, size), _fresh(model)
    said: dict[str, Any] = {}

    def ask_theirs() -> None:
        said["theirs"] = _ask(theirs, asked)

    def ask_ours() -> None:
        said["ours"] = _ask(ours.pop(), asked)

    took = times([ask_theirs, ask_ours], ROUNDS)
    _refuse_difference(said["ours"], said["theirs"])
    least, median = ratio(*took)
    how = (
        f"hf with its best batch size {size}: {min(took[0]):.2f} s, ours {min(took[1]):.2f} s, "
        f"minima of {ROUNDS}, medians {median:.2f}; {len(asked)} requests, one thread"
    )
    return least, saving(model, asked), how


def _fresh(model: Model) -> list[LmEvalAdapter]:
    """Return an adapter for each round and the warm-up, as one remembers what it answered."""
    adapters = [LmEvalAdapter(model, 16, SILENT, "prefix_sharing") for _ in range(ROUNDS + 1)]
    reports = [each.backend_report for each in adapters]
    assert all(each.used == "prefix_sharing" for each in reports), reports[0].reasons
    return adapters


def reference(model: Model, batch_size: int) -> Any:
    """Return lm-eval's own back end around the same network."""
    from lm_eval.models.huggingface import HFLM

    with quiet_lm_eval():
        return HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch_size)


class Listening:
    """A scorer that only remembers what it is asked."""

    def __init__(self) -> None:
        self.heard: list[LoglikelihoodRequest] = []

    def score(self, questions: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield an answer that means nothing for each question."""
        self.heard += questions
        yield [(number, Loglikelihood(0.0, False)) for number in range(len(questions))]


def saving(model: Model, asked: Sequence[Any]) -> float:
    """Return how many times fewer tokens the trie of the requests' inputs has."""
    adapter, listening = LmEvalAdapter(model, 1, SILENT, "padded"), Listening()
    adapter.scorer = listening
    _ask(adapter, asked)
    distinct = {tuple(question.inputs) for question in listening.heard}
    return sum(map(len, distinct)) / Trie(listening.heard).tokens


def _ask(lm: Any, asked: Sequence[Any]) -> Any:
    with redirect_stderr(StringIO()):
        return lm.loglikelihood(asked, disable_tqdm=True)


def _seconds(lm: Any, asked: Sequence[Any]) -> float:
    began = time.perf_counter()
    _ask(lm, asked)
    return time.perf_counter() - began


def _refuse_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Raise when the two do not say the same, as a speed then means nothing."""
    for mine, other in zip(ours, theirs, strict=True):
        # Added up in float32, a sum in the thousands is known no better than the second term.
        allowed = TOLERANCE + abs(other[0]) * 2**-23
        if abs(mine[0] - other[0]) > allowed or mine[1] != other[1]:
            raise AssertionError(f"the answers differ: {mine} and {other}")
