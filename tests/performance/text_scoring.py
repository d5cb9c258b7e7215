"""How much faster requests are scored than by lm-eval's own `hf`, same weights, same requests.

The token saving is how many times fewer tokens a trie of a task's inputs has than the distinct
inputs that `hf` sends, which answers choices of one token together. Speed is to follow it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import torch

from bench.evaluation.text.adapter import Adapter
from bench.evaluation.text.quiet import quiet
from bench.evaluation.text.shared.trie import Trie
from bench.models.model import Model
from bench.progress import SILENT
from tests.performance import exams, random_models
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

DOCUMENTS, SHOT_DOCUMENTS, ROUNDS = 40, 6, 5
BATCH_SIZES = (1, 4, 16, 64)
TOLERANCE = 1e-4


def figures() -> list[Figure]:
    """Speed-up over token saving for each task, zero-shot; the speed-up itself with five shots."""
    torch.set_num_threads(1)
    zero = {task.name: exams.requests(task, DOCUMENTS) for task in exams.tasks(DOCUMENTS)}
    five = exams.tasks(SHOT_DOCUMENTS, shots=5)
    shots = {task.name: exams.requests(task, SHOT_DOCUMENTS) for task in five}
    words = random_models.tokenizer(t for asked in zero.values() for t in exams.texts(asked))
    found = []
    for kind in random_models.CONFIGS:
        model = random_models.build(kind, words)
        found += [_zero_shot(model, name, asked) for name, asked in zero.items()]
        name = next(iter(shots))
        found.append(_five_shot(model, name, shots[name]))
    return found


def _zero_shot(model: Model, name: str, asked: Sequence[Any]) -> Figure:
    speed, saving, how = measure(model, asked)
    value = speed / saving
    how = f"{speed:.2f} times faster, {saving:.2f} times fewer tokens; {how}"
    return Figure(f"{model.name}, {name}: speed-up over saving", value, ">= 1", value >= 1, how)


def _five_shot(model: Model, name: str, asked: Sequence[Any]) -> Figure:
    speed, saving, how = measure(model, asked)
    how = f"{saving:.2f} times fewer tokens; {how}"
    return Figure(f"{model.name}, {name}: speed-up, five-shot", speed, ">= 3", speed >= 3, how)


def measure(model: Model, asked: Sequence[Any]) -> tuple[float, float, str]:
    """Return speed-up, token saving and how they were had; answers are compared on the way."""
    ours = Adapter(model, 16, SILENT, "shared")
    assert ours.asked.used == "shared", ours.asked.reasons
    size = min(BATCH_SIZES, key=lambda size: _seconds(reference(model, size), asked))
    theirs = reference(model, size)
    _refuse_difference(_ask(ours, asked), _ask(theirs, asked))
    took = times([partial(_ask, theirs, asked), partial(_ask, ours, asked)], ROUNDS)
    least, median = ratio(*took)
    how = (
        f"hf with its best batch size {size}: {min(took[0]):.2f} s, ours {min(took[1]):.2f} s, "
        f"minima of {ROUNDS}, medians {median:.2f}; {len(asked)} requests, one thread"
    )
    return least, saving(ours, asked), how


def reference(model: Model, batch_size: int) -> Any:
    """Return lm-eval's own back end around the same network."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch_size)


def saving(adapter: Adapter, asked: Sequence[Any]) -> float:
    """Return how many times fewer tokens the trie of the requests' inputs has."""
    scored = adapter.scorer
    seen: list[Any] = []

    class Watched:
        def score(self, questions: Any) -> Any:
            seen.extend(questions)
            return scored.score(questions)

    adapter.scorer = Watched()
    try:
        _ask(adapter, asked)
    finally:
        adapter.scorer = scored
    distinct = {tuple(question.inputs) for question in seen}
    return sum(map(len, distinct)) / Trie(seen).tokens


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
