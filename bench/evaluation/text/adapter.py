"""Adapters to lm-eval's language model interface: for a loaded model, and for stored answers.

Tokenization, truncation and log-likelihoods are those of lm-eval's own `hf` model, with two
exceptions: `hf` stops at an answer that has no token of its own, and scores EOS after EOS if the
tokenizer appends one. This adapter is faster, because it tokenizes every text once and all of them
in one call, and a scorer decides what goes through the network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bench.data.tokenization import appended_tokens, encode_texts
from bench.errors import UserError
from bench.evaluation.batching import batches_for
from bench.evaluation.evidence import EvidenceLog, Seen, check_length
from bench.evaluation.harness import BackendReport
from bench.evaluation.metrics import NON_FINITE_LOGITS, SampleRow
from bench.evaluation.response_cache import IndexedResponses, ResponseCache, request_key
from bench.evaluation.text.chat import (
    ChatRenderer,
    Conversation,
    TextMessage,
    conversation_of,
    conversation_text,
)
from bench.evaluation.text.generation import (
    Generated,
    GenerationRequest,
    GenerationSettings,
    context_limit,
    generate,
)
from bench.evaluation.text.requests import (
    LoglikelihoodRequest,
    Scorer,
    Tokens,
    truncated_request,
)
from bench.evaluation.text.scorers import select_scorer
from bench.models.model import Model
from bench.schema import Backend, Overlong
from bench.ui import Progress

NO_ANSWER = (math.nan, False)
"""Response to a request that was not sent to the model."""
EMPTY_ANSWER = "the answer is empty: it has no tokens"


class EncodedRequest(NamedTuple):
    """A request as tokens; `spans` says that a token contains the end of the context."""

    context: Tokens
    answer: Tokens
    spans: bool = False


class FittedPrompt(NamedTuple):
    """A prompt without the `cut` tokens on its left; `left_out` is the reason if it is skipped."""

    tokens: Tokens
    cut: int
    left_out: str | None = None


class LmEvalAdapter(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Serves the harness's requests with a `Model` and reports the backend used.

    `scorer` computes the log-likelihoods that are not in the response cache; the default is that of
    `backend`, which is chosen after a trial forward. `evidence` records each request as the model
    got it. `chat` renders conversations, and `think_end` is the token that ends the thoughts before
    an answer.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int | Literal["auto"],
        progress: Progress,
        backend: Backend = "prefix_sharing",
        cache: ResponseCache | None = None,
        overlong: Overlong = "truncate",
        *,
        chat: ChatRenderer | None = None,
        think_end: str | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        model.network.eval()
        self.tokenizer = model.tokenizer
        self._chat = chat or ChatRenderer(model.tokenizer, None, {}, progress)
        self._think_end = think_end
        self.evidence = EvidenceLog()
        self._overlong = overlong
        self.batches = batches_for(model, batch_size, progress)
        self.scorer, self.backend_report = (
            select_scorer(model, backend, self.batches, progress)
            if scorer is None
            else (scorer, BackendReport(backend))
        )
        self._cache = cache or ResponseCache()
        self._model = model
        # Stored, because it is needed for every request and attributes of configs are slow.
        self._longest = model.max_length
        self._progress = progress
        begin = self._begin_or_end
        self._prefix_text = None if begin is None else str(self.tokenizer.decode(begin))
        self._encoded: dict[str, list[int]] = {}
        appended = appended_tokens(self.tokenizer) if model.config.add_bos is not False else []
        if appended:
            progress.warn(
                f"the tokenizer of {model.name} appends {self.tokenizer.decode(appended)} to every "
                "text; it is left out, because no answer can follow it (lm-eval scores only what "
                "comes after it)"
            )

    @property
    def tokenizer_name(self) -> str:
        """A name by which the harness could cache requests, which it does not."""
        return self._model.name

    @property
    def conversations(self) -> Mapping[str, Conversation]:
        """The conversations of the prompts rendered with a chat template."""
        return self._chat.conversations

    def apply_chat_template(
        self, chat_history: list[TextMessage], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation."""
        return self._chat.render(chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def _begin_or_end(self) -> int | None:
        begin: int | None = self.tokenizer.bos_token_id
        end: int | None = self.tokenizer.eos_token_id
        return end if begin is None else begin

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: BOS if the tokenizer has one, else EOS."""
        if self._begin_or_end is None:
            raise UserError(
                f"the tokenizer of model {self._model.name} has neither a BOS nor an end-of-text "
                "token to replace an empty context: set eos_token in its tokenizer_config.json"
            )
        return int(self._begin_or_end)

    def _begins(self, text: str) -> bool:
        """Return whether a text already begins with the BOS token."""
        return self._prefix_text is not None and text.startswith(self._prefix_text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokenize text; BOS is added as the model config or the tokenizer says, never twice."""
        if add_special_tokens is None:
            # The harness encodes texts one by one. The lookup allows for encoding all of them
            # before, in parallel.
            encoded = self._encoded.get(string)
            return self._encode([string])[0] if encoded is None else encoded
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts; either all of them or none must start with the BOS text."""
        special = self._model.config.add_bos
        # lm-eval's rule: a chat template that wrote BOS itself must not get a second one.
        if self._begins(texts[0]):
            special = False
        return encode_texts(self.tokenizer, texts, add_special_tokens=special)

    def _encode_once(self, texts: Iterable[str]) -> None:
        """Tokenize distinct texts together for `tok_encode` to look up."""
        self._encoded = {}
        distinct = dict.fromkeys(texts)
        for with_bos in (True, False):
            group = [text for text in distinct if self._begins(text) == with_bos]
            if group:
                # `add_special_tokens` is the same for all texts of a call, hence up to two calls.
                self._encoded |= zip(group, self._encode(group), strict=True)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation and whether it is the greedy one."""
        self._encode_once(text for request in requests for text in _texts_to_encode(*request.args))
        encoded = [self._encode_request(*request.args) for request in requests]
        self._encoded = {}
        reasons = [
            self._record(request, *each) for request, each in zip(requests, encoded, strict=True)
        ]
        fitting = [index for index, reason in enumerate(reasons) if reason is None]
        scored = self._loglikelihood_tokens(
            [(None, encoded[index].context, encoded[index].answer) for index in fitting]
        )
        responses = dict(zip(fitting, scored, strict=True))
        return [responses.get(index, NO_ANSWER) for index in range(len(requests))]

    def _encode_request(self, context: str, answer: str) -> EncodedRequest:
        """Return a request as tokens, split as in lm-eval.

        A token may contain the end of the context and the start of the answer. lm-eval splits the
        tokens of the whole text after as many tokens as the context alone has, and scores the rest.
        If nothing is left, lm-eval fails; here the answer is then encoded alone.
        """
        # A context of spaces counts as empty, because lm-eval moves them to the answer.
        if not context or (not context.strip() and not self.tok_encode("")):
            return self._encode_alone(context + answer)
        context_ids, answer_ids = self._encode_pair(context, answer)
        spans = self.tok_encode(context + answer)[: len(context_ids)] != context_ids
        if not answer_ids:
            spaces = context[len(context.rstrip()) :]
            answer_ids = self.tok_encode(spaces + answer, add_special_tokens=False)
        return EncodedRequest(context_ids, answer_ids, spans)

    def _encode_alone(self, answer: str) -> EncodedRequest:
        """Return the tokens of an answer without context, after BOS or EOS."""
        ids, prefix = self.tok_encode(answer, add_special_tokens=False), self.prefix_token_id
        # As in lm-eval, an answer that begins with that token does not get it twice.
        return EncodedRequest([prefix], ids[1:] if ids[:1] == [prefix] else ids)

    def _record(
        self, request: Instance, context: Tokens, answer: Tokens, spans: bool
    ) -> str | None:
        """Record a request as the model gets it; return the reason if it is skipped, or None."""
        longest, tokens = self._longest, len(context) + len(answer)
        reason = None if answer else EMPTY_ANSWER
        if len(answer) > longest:
            reason = f"the answer alone is longer than the {longest} tokens that the model accepts"
        elif answer:
            # One token more than the network takes, because the last one is never an input.
            where, name = _place(request), self._model.name
            reason = check_length(self._overlong, where, tokens, longest + 1, name)
        cut = 0 if reason else max(0, tokens - longest - 1)
        left = context[cut:]
        prompt = self.tokenizer.decode(left) if cut else None
        seen = Seen(len(left), len(answer), cut, prompt, spans, unanswered=reason)
        self.evidence.requests[request.task_name, request.doc_id].append(seen)
        return reason

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the model allows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._longest, 1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in rolling]
            # The windows of all texts are scored together, so that short texts share batches.
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to its first stop string."""
        self._encode_once(request.args[0] for request in requests)
        prompts = [self._fit_prompt(request) for request in requests]
        self._encoded = {}
        fitting = [index for index, prompt in enumerate(prompts) if prompt.left_out is None]
        generated = generate(
            self._model,
            [
                GenerationRequest(prompts[index].tokens, requests[index].args[1])
                for index in fitting
            ],
            self.batches,
            self._cache,
            self._progress,
            self._think_end,
        )
        answers = dict(zip(fitting, generated, strict=True))
        found = [answers.get(index) for index in range(len(requests))]
        for request, prompt, answer in zip(requests, prompts, found, strict=True):
            task, tokens = request.task_name, prompt.tokens
            text = self.tokenizer.decode(tokens) if prompt.cut else None
            seen = Seen(len(tokens), answer.tokens if answer else 0, prompt.cut, text)
            if answer is None:
                seen = replace(seen, unanswered=prompt.left_out or NON_FINITE_LOGITS)
            else:
                seen = replace(seen, finish=answer.finish, thoughts=answer.thoughts)
            self.evidence.requests[task, request.doc_id].append(seen)
            if task not in self.evidence.settings:
                settings = GenerationSettings(self._model, request.args[1], self._think_end)
                self.evidence.settings[task] = settings.in_force
        self._warn_about_thoughts(requests, found)
        # The harness's filters take strings only.
        return ["" if answer is None else answer.text for answer in found]

    def _warn_about_thoughts(
        self, requests: Sequence[Instance], answers: Sequence[Generated | None]
    ) -> None:
        """Warn about tasks with answers in which the thoughts do not end."""
        pairs = [pair for pair in zip(requests, answers, strict=True) if pair[1] is not None]
        endless = Counter(r.task_name for r, answer in pairs if answer and answer.thoughts == "")
        if endless:
            asked = Counter(request.task_name for request, _ in pairs)
            named = ", ".join(f"{task} {count} of {asked[task]}" for task, count in endless.items())
            self._progress.warn(
                f"answers without {self._think_end} are scored whole, as in lm-eval ({named}); "
                "a larger benchmark.gen_kwargs.max_gen_toks leaves more room for thoughts"
            )

    def _fit_prompt(self, request: Instance) -> FittedPrompt:
        """Return a prompt as tokens, cut on the left to leave room for its answer."""
        text, options = request.args
        tokens, name = self.tok_encode(text), self._model.name
        limit = context_limit(options, self._longest, name)
        reason = check_length(self._overlong, _place(request), len(tokens), limit, name)
        if reason is not None:
            return FittedPrompt(tokens, 0, reason)
        return FittedPrompt(tokens[-limit:], max(0, len(tokens) - limit))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        truncated = [
            truncated_request(self._longest, context, continuation)
            for _, context, continuation in requests
        ]
        responses = self._cache.get_or_compute(
            [request_key("loglikelihood", *request) for request in truncated],
            lambda missing: self._score(missing, [truncated[index] for index in missing]),
            self._progress,
        )
        return [(value, bool(greedy)) for value, greedy in responses]

    def _score(
        self, indices: Sequence[int], requests: Sequence[LoglikelihoodRequest]
    ) -> Iterator[IndexedResponses[list[float]]]:
        """Yield the responses of each batch, with indices into the full list of requests."""
        for batch in self.scorer.score(requests):
            # A list, as read from the JSON of the journal in a resumed run.
            yield [(indices[index], list(result)) for index, result in batch]


class StoredAnswers(LM):  # type: ignore[misc]  # the harness has no types
    """Answers the harness's requests from the answers in sample rows."""

    def __init__(self, rows: Sequence[SampleRow]) -> None:
        super().__init__()
        # All rows of a document, one per filter, have the same answers.
        self._rows = {(row["task"], row["doc_id"]): row for row in rows}
        self.conversations: dict[str, Conversation] = {}
        self.evidence = EvidenceLog()
        for document, row in self._rows.items():
            if row.get("missing") is not None:
                self.evidence.requests[document] = [Seen(0, 0, unanswered=row["missing"])]

    tokenizer_name = "stored answers"

    def apply_chat_template(
        self, chat_history: list[TextMessage], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages without a template, because that of the model is not available."""
        text = conversation_text(chat_history, add_generation_prompt)
        self.conversations[text] = conversation_of(chat_history, add_generation_prompt)
        return text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation and whether it is the greedy one."""
        return [
            (self._stored(request, "loglikelihoods"), self._stored(request, "greedy"))
            for request in requests
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of whole texts."""
        return [self._stored(request, "loglikelihoods") for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the texts before any filter."""
        repetitions: Counter[tuple[str, int]] = Counter()
        texts = []
        for request in requests:
            # Repeated requests of a document ask for its answers one by one.
            document = (request.task_name, request.doc_id)
            texts.append(self._stored(request, "generations", repetitions[document]))
            repetitions[document] += 1
        return texts

    def _stored(self, request: Instance, column: str, position: int | None = None) -> Any:
        row = self._rows.get((request.task_name, request.doc_id), {})
        stored, index = row.get(column), request.idx if position is None else position
        if not stored or index >= len(stored):
            found = f"only {len(stored)} {column}, and the task asks for more" if stored else None
            raise UserError(
                f"{_place(request)}: the run stored {found or f'no {column}'}, "
                "so it cannot be scored again without the model"
            )
        return stored[index]


def _texts_to_encode(context: str, continuation: str) -> tuple[str, ...]:
    """Return the strings that lm-eval tokenizes for a request: the context and the whole text."""
    # `TemplateLM._encode_pair` moves trailing spaces of the context to the continuation first. An
    # empty context is rare and not prepared.
    return (context.rstrip(), context + continuation) if context else ()


def _place(request: Instance) -> str:
    """Return the document of a request for use in messages."""
    return f"task {request.task_name}, document {request.doc_id}"
