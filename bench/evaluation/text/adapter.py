"""A loaded, possibly compressed model as lm-eval's language model.

Tokenization, truncation and log-likelihoods are those of lm-eval's own `hf` model. Only the cost
differs: all texts are tokenized in one call, each once, and a scorer decides what goes through the
network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.metrics import NON_FINITE_LOGITS
from bench.evaluation.response_cache import IndexedResponses, ResponseCache, request_key
from bench.evaluation.text.generation import GenerationRequest, generate
from bench.evaluation.text.requests import LoglikelihoodRequest, truncated_request
from bench.evaluation.text.scorers import select_scorer
from bench.models.model import Model
from bench.schema import Backend
from bench.ui import Progress


class LmEvalAdapter(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Serves the harness's requests with a `Model` and reports the backend used.

    `scorer` computes the log-likelihoods that the response cache does not hold. `unanswered` maps
    (task, document) to the reason where a generated text is none.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        progress: Progress,
        backend: Backend = "prefix_sharing",
        cache: ResponseCache | None = None,
    ) -> None:
        super().__init__()
        model.network.eval()
        self.tokenizer = model.tokenizer
        self.batches = AdaptiveBatches(batch_size, model.device, progress)
        self.scorer, self.backend_report = select_scorer(model, backend, self.batches, progress)
        self._cache = cache or ResponseCache()
        self._model = model
        self._progress = progress
        self._prefix_text: str = self.tokenizer.decode(self.prefix_token_id)
        self._encoded: dict[str, list[int]] = {}
        self.unanswered: dict[tuple[str, int], str] = {}

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS if the tokenizer has one, else EOS."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokenize text; BOS is added as the model config or the tokenizer says, never twice."""
        if add_special_tokens is None:
            # The harness encodes context and whole text of every request one by one; the lookup
            # lets a fast tokenizer do all of them in parallel instead.
            encoded = self._encoded.get(string)
            return self._encode([string])[0] if encoded is None else encoded
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts, which must all start with the BOS text or all not."""
        special = self._model.config.add_bos
        # lm-eval's rule: a chat template that wrote BOS itself must not get a second one.
        if texts[0].startswith(self._prefix_text):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        ids: list[list[int]] = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return ids

    def _encode_once(self, texts: Iterable[str]) -> None:
        """Tokenize distinct texts together for `tok_encode` to look up."""
        self._encoded = {}
        distinct = dict.fromkeys(texts)
        for with_bos in (True, False):
            group = [text for text in distinct if text.startswith(self._prefix_text) == with_bos]
            if group:
                # One call takes one value of `add_special_tokens`, hence two calls at most.
                self._encoded |= zip(group, self._encode(group), strict=True)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation and whether it is the greedy one."""
        self._encode_once(text for request in requests for text in _texts_to_encode(*request.args))
        # The base class splits context from continuation, with its rule for trailing spaces, and
        # calls `_loglikelihood_tokens`.
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._encoded = {}
        return scored

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the model allows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._model.max_length, 1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in rolling]
            # The windows of all texts are scored together, so short texts fill batches too.
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to its first stop string."""
        generations = [
            GenerationRequest(self.tok_encode(context), options)
            for context, options in (request.args for request in requests)
        ]
        texts = generate(self._model, generations, self.batches, self._cache, self._progress)
        for request, text in zip(requests, texts, strict=True):
            if text is None:
                self.unanswered[request.task_name, request.doc_id] = NON_FINITE_LOGITS
        # The harness's filters take strings only.
        return [text or "" for text in texts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        truncated = [
            truncated_request(self._model, context, continuation)
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
            # A list, because the journal is JSON: a resumed run must see what a fresh one sees.
            yield [(indices[index], list(result)) for index, result in batch]


def _texts_to_encode(context: str, continuation: str) -> tuple[str, ...]:
    """Return the strings that lm-eval tokenizes for a request: the context, and all of it."""
    # `TemplateLM._encode_pair` moves trailing spaces of the context to the continuation before it
    # tokenizes. An empty context takes another path, which is not worth preparing.
    return (context.rstrip(), context + continuation) if context else ()
