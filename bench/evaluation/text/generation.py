"""Generation up to stop strings, batched by settings and length as in lm-eval's `hf` model.

Suffixes: B batch, T padded length.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria

from bench.errors import UserError
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.harness import SEED
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.model import Model
from bench.ui import Progress

GenerationRequest: TypeAlias = tuple[list[int], dict[str, Any]]
"""Tokens of a context, and the harness's generation settings for it."""


def generate(
    model: Model,
    asked: Sequence[GenerationRequest],
    batches: AdaptiveBatches,
    memory: ResponseCache,
    progress: Progress,
) -> list[str]:
    """Return one continuation per context; contexts with equal settings share batches.

    A task that samples several answers repeats its request, and each repetition is drawn
    independently.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (_, options) in enumerate(asked):
        groups[json.dumps(options, sort_keys=True, default=str)].append(number)
    texts = [""] * len(asked)
    for numbers in groups.values():
        # Longest first: padding stays small, and a batch that does not fit fails at the start.
        numbers.sort(key=lambda number: -len(asked[number][0]))
        settings = GenerationSettings(model, asked[numbers[0]][1])
        contexts = [asked[number][0] for number in numbers]
        keys = _request_keys(contexts, asked[numbers[0]][1])
        named = list(zip(keys, contexts, strict=True))
        sizes = list(map(len, contexts))
        answers = memory.batched(keys, named, sizes, batches, settings.run, progress)
        for number, text in zip(numbers, answers, strict=True):
            texts[number] = text
    return texts


def _request_keys(contexts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
    """Name each request by its context, its settings and the number of equal requests before it."""
    before: Counter[tuple[int, ...]] = Counter()
    keys = []
    for context in contexts:
        # Without the count, repetitions would be one request to the response cache, and a task that
        # takes several samples would get one sample several times.
        keys.append(request_key("generation", context, options, before[tuple(context)]))
        before[tuple(context)] += 1
    return keys


class GenerationSettings:
    """One set of generation settings, ready to run on batches of contexts."""

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self._model = model
        self._options: dict[str, Any] = dict(normalize_gen_kwargs(options))
        end = model.tokenizer.decode(model.tokenizer.eos_token_id, skip_special_tokens=False)
        self._stop: list[str] = handle_stop_sequences(self._options.pop("until", None), eos=end)
        self._new = int(self._options.pop("max_gen_toks"))
        # Replaced in `run`: the limit there counts from the padded width, as in lm-eval's `hf`
        # model.
        self._options.pop("max_length", None)
        # transformers warns about a temperature that greedy decoding does not read.
        if not self._options.get("do_sample"):
            self._options.pop("temperature", None)
        self._longest = model.max_length - self._new
        if self._longest < 1:
            raise UserError(
                f"the task generates {self._new} tokens, which leaves none for a context: "
                f"model {model.name} takes {model.max_length} in total"
            )

    @torch.no_grad()
    def run(self, named: Sequence[tuple[str, list[int]]]) -> list[str]:
        """Continue (key, context) pairs of any length, truncated and padded on the left.

        Sampling depends on the batch and not on what was drawn before it.
        """
        contexts = [context for _, context in named]
        if self._options.get("do_sample"):
            # The seed is a hash of the batch's keys: a resumed run must draw for a batch what the
            # interrupted run would have drawn, although it did not draw for the batches before. 15
            # hexadecimal digits, since torch takes a signed 64-bit seed.
            torch.manual_seed(int(request_key(SEED, *(name for name, _ in named))[:15], 16))
        # On the left a context is truncated, as lm-eval does, and padded, so that all rows end at
        # one column and `generate` appends there.
        ids_BT, mask_BT = self._pad([context[-self._longest :] for context in contexts])
        width = ids_BT.shape[1]
        tokenizer = self._model.tokenizer
        network: Any = self._model.network
        made_BT = network.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_length=width + self._new,
            stopping_criteria=stop_sequences_criteria(tokenizer, self._stop, width, len(contexts)),
            pad_token_id=self._padding(),
            use_cache=True,
            **self._options,
        )
        texts = (tokenizer.decode(row[width:], skip_special_tokens=True) for row in made_BT)
        return [postprocess_generated_text(text, self._stop, None) for text in texts]

    def _padding(self) -> int:
        token = self._model.tokenizer.pad_token_id
        return int(self._model.tokenizer.eos_token_id if token is None else token)

    def _pad(self, contexts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, contexts))
        fill = self._padding()
        ids = [[fill] * (width - len(context)) + context for context in contexts]
        mask = [[0] * (width - len(context)) + [1] * len(context) for context in contexts]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
