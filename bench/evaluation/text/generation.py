"""Generation up to stop strings, batched by settings and length as in lm-eval's `hf` model.

Suffixes: B batch, T padded length.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import GenerationConfig, LogitsProcessorList

from bench.errors import UserError, nearest
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.evidence import Finish, settings_in_force, tokens_until_stop
from bench.evaluation.harness import SEED
from bench.evaluation.networks import NonFiniteRows, language_model, pad_left
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.models.model import Model
from bench.schema import BenchmarkConfig
from bench.ui import Progress


class GenerationRequest(NamedTuple):
    """Tokens of a context that fits, and the harness's generation settings for it."""

    context: list[int]
    options: Mapping[str, object]


class Generated(NamedTuple):
    """A text before any filter, how it ended, its tokens up to there, and what came before it.

    `thoughts` are what a reasoning model wrote before its answer, None unless they were looked for.
    """

    text: str
    finish: Finish
    tokens: int
    thoughts: str | None = None


def context_limit(options: Mapping[str, object], longest: int, name: str) -> int:
    """Return the tokens that a task's settings leave for a context, of `longest` in total.

    Raises:
        UserError: they leave none.
    """
    new_tokens = int(normalize_gen_kwargs(options)["max_gen_toks"])
    if new_tokens < longest:
        return longest - new_tokens
    raise UserError(
        f"the task generates {new_tokens} tokens, which leaves none for a context: "
        f"model {name} takes {longest} in total"
    )


def check_generation(benchmark: BenchmarkConfig, tasks: Sequence[str]) -> None:
    """Raise UserError if generation settings apply to no task, or transformers has none such."""
    for key in ("gen_kwargs", "think_end_token"):
        if getattr(benchmark, key) and not tasks:
            raise UserError(f"benchmark.{key}: none of benchmark.tasks generates a text")
    known = {*vars(GenerationConfig()), *HARNESS_SETTINGS}
    for name in benchmark.gen_kwargs:
        if name not in known or name.startswith("_"):
            close = nearest(name, known)
            hint = (
                f"did you mean {close!r}?" if close else "transformers' GenerationConfig lists them"
            )
            raise UserError(f"unknown setting {name!r} in benchmark.gen_kwargs: {hint}")


HARNESS_SETTINGS = (
    "until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
)  # fmt: skip
"""Generation settings that lm-eval handles itself."""


def generate(
    model: Model,
    requests: Sequence[GenerationRequest],
    batches: AdaptiveBatches,
    cache: ResponseCache,
    progress: Progress,
    think_end: str | None = None,
) -> list[Generated | None]:
    """Return one continuation per context; contexts with equal settings share batches.

    A continuation is None if the network's logits are not finite. `think_end` is the token that
    ends the thoughts before an answer. If a task repeats a request to sample several answers, each
    repetition is sampled independently.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[json.dumps(request.options, sort_keys=True, default=str)].append(index)
    generated: dict[int, Generated | None] = {}
    for group in groups.values():
        # Longest first, for little padding, and so that memory runs out at the start if at all.
        group.sort(key=lambda index: -len(requests[index].context))
        options = requests[group[0]].options
        settings = GenerationSettings(model, options, think_end)
        contexts = [requests[index].context for index in group]
        keys = _request_keys(contexts, options)
        keyed = list(zip(keys, contexts, strict=True))
        sizes = [len(context) + settings.new_tokens for context in contexts]
        responses = cache.get_or_compute_batched(
            keys, keyed, sizes, batches, settings.run, progress
        )
        generated |= {
            index: None if response is None else Generated(*response)
            for index, response in zip(group, responses, strict=True)
        }
    return [generated[index] for index in range(len(requests))]


def _request_keys(contexts: Sequence[list[int]], options: Mapping[str, object]) -> list[str]:
    """Return a key per request: its context, settings and the number of equal earlier requests."""
    repetitions: Counter[tuple[int, ...]] = Counter()
    keys = []
    for context in contexts:
        # Without the number, the response cache would return the same sample for all repetitions.
        keys.append(request_key("generation", context, options, repetitions[tuple(context)]))
        repetitions[tuple(context)] += 1
    return keys


class GenerationSettings:
    """One set of generation settings, ready to run on batches of contexts."""

    def __init__(
        self, model: Model, options: Mapping[str, object], think_end: str | None = None
    ) -> None:
        self._model = model
        self._think_end = think_end
        settings = dict(normalize_gen_kwargs(options))
        self.new_tokens = int(settings.pop("max_gen_toks"))
        tokenizer, own = model.tokenizer, language_model(model).generation_config
        # The model's own end tokens end a row in addition to the tokenizer's EOS.
        ends = own.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        end = tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
        self._stop: list[str] = handle_stop_sequences(settings.pop("until", None), eos=end)
        # Replaced in `run`, where the limit starts from the padded width, as in lm-eval's `hf`.
        settings.pop("max_length", None)
        # transformers warns about a temperature in greedy decoding.
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        self._options: dict[str, object] = settings
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._pad_token = int(eos if pad is None else pad)
        self.in_force = settings_in_force(
            own.to_diff_dict(), settings, max_gen_toks=self.new_tokens, until=self._stop
        )

    def run(self, keyed: Sequence[tuple[str, list[int]]]) -> list[list[Any] | None]:
        """Continue (key, context) pairs of any length, padded on the left.

        Return the fields of `Generated` as JSON values, or None for rows with logits that are not
        finite. Samples depend on the batch but not on earlier draws.
        """
        texts = self._continue(keyed)
        if len(keyed) == 1:
            return texts
        # Repeated alone and without padding, because NaN at a padding token spreads although it is
        # masked, and results must not depend on the batch.
        return [
            self._continue([pair])[0] if text is None else text
            for pair, text in zip(keyed, texts, strict=True)
        ]

    @torch.no_grad()
    def _continue(self, keyed: Sequence[tuple[str, list[int]]]) -> list[list[Any] | None]:
        contexts = [context for _, context in keyed]
        if self._options.get("do_sample"):
            # Seeded by the batch's keys, so that a resumed run, which skips earlier batches, draws
            # the same samples. 15 hexadecimal digits, since torch takes a signed 64-bit seed.
            torch.manual_seed(int(request_key(SEED, *(key for key, _ in keyed))[:15], 16))
        # Padded on the left, because `generate` appends to the right end of all rows.
        rows = [torch.tensor([context], dtype=torch.long) for context in contexts]
        ids_BT, device = pad_left(rows, self._pad_token), self._model.device
        mask_BT = pad_left([torch.ones_like(row) for row in rows], 0)
        width, tokenizer = ids_BT.shape[1], self._model.tokenizer
        lost = NonFiniteRows(len(contexts), width, int(tokenizer.eos_token_id))
        output_BT = language_model(self._model).generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_length=width + self.new_tokens,
            stopping_criteria=stop_sequences_criteria(tokenizer, self._stop, width, len(contexts)),
            logits_processor=LogitsProcessorList([lost]),
            # Overrides a checkpoint's generation config, which may replace NaN by 0.
            remove_invalid_values=False,
            pad_token_id=self._pad_token,
            use_cache=True,
            **self._options,
        )
        return [
            self._generated(row, finite)
            for row, finite in zip(
                output_BT[:, width:].tolist(), lost.tokens_B.tolist(), strict=True
            )
        ]

    def _generated(self, row: list[int], finite: int) -> list[Any] | None:
        """Return the fields of `Generated`, cut at the first stop string, without padding.

        Return None if logits before that were not finite: `finite` is the number of tokens before
        the first such logits, or -1 if all were finite.
        """
        decode = self._model.tokenizer.decode
        # A finished row continues until its batch is done; tokens after its end do not matter.
        before = decode(row[:finite], skip_special_tokens=False) if finite >= 0 else ""
        if finite >= 0 and not any(stop in before for stop in self._stop):
            return None
        thinking, thoughts, answer = self._without_thoughts(row)
        text: str = postprocess_generated_text(answer, self._stop, None)
        if text != answer:
            tokens = tokens_until_stop(row[thinking:], self._text, self._stop)
            return [text, "stop", thinking + tokens, thoughts]
        end = next((index for index, token in enumerate(row) if token in self._ends), None)
        if end is None:
            return [text, "length", len(row), thoughts]
        return [text, "eos", end, thoughts]

    def _without_thoughts(self, row: Sequence[int]) -> tuple[int, str | None, str]:
        """Return the number of tokens of the thoughts before an answer, their text, and the answer.

        As in lm-eval, the last of several end tokens counts, and thoughts that do not end are the
        answer. The text is None without `think_end`.
        """
        whole, end = self._text(row), self._think_end
        if end is None:
            return 0, None, whole

        def ends(count: int) -> int:
            # With special tokens, because `think_end` may be one, which would be dropped.
            text: str = self._model.tokenizer.decode(row[:count], skip_special_tokens=False)
            return text.count(end)

        total = ends(len(row))
        if not total:
            return 0, "", whole.lstrip()
        thinking = bisect_left(range(len(row)), total, key=ends)
        thoughts, found, answer = whole.rpartition(end)
        if not found:
            thoughts, answer = self._text(row[:thinking]), self._text(row[thinking:])
        return thinking, thoughts, answer.lstrip()

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
