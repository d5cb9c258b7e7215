"""The padded and the distributed scorer, and the choice of a scorer for a model.

The padded backend sends one padded row per distinct input, as lm-eval's `hf` model does.

Suffixes: B batch, T padded length, K kept positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import torch

from bench.evaluation import batching
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.distributed import ProcessGroup, current_process_group
from bench.evaluation.harness import BackendReport, select_backend
from bench.evaluation.networks import language_model
from bench.evaluation.text.prefix import support
from bench.evaluation.text.prefix.forward import Forward
from bench.evaluation.text.prefix.scorer import PrefixSharingScorer
from bench.evaluation.text.requests import (
    Loglikelihood,
    LoglikelihoodRequest,
    Loglikelihoods,
    Scorer,
    Tokens,
)
from bench.models.model import Model
from bench.models.network import sliding_window, text_config
from bench.schema import Backend
from bench.ui import Progress


def select_scorer(
    model: Model, backend: Backend, batches: AdaptiveBatches, progress: Progress
) -> tuple[Scorer, BackendReport]:
    """Return a scorer for a model, and the report on its backend."""
    scorer, report = _local_scorer(model, backend, batches, progress)
    group = current_process_group()
    return (scorer if group.world_size == 1 else DistributedScorer(scorer, group)), report


def _local_scorer(
    model: Model, backend: Backend, batches: AdaptiveBatches, progress: Progress
) -> tuple[Scorer, BackendReport]:
    # Checked only if the backend is requested, since the check runs a forward.
    reason = support.unsupported_reason(model) if backend == "prefix_sharing" else None
    report = select_backend(model, backend, reason, progress)
    padded = PaddedScorer(model, batches)
    if report.used == "padded":
        return IsolatingScorer(padded, padded), report
    network = language_model(model)
    budget = batching.estimate_token_budget(
        text_config(model.network), network.dtype, model.device, progress
    )
    report.tokens_per_batch = budget.tokens
    forward = Forward(network, model.device)
    sharing = PrefixSharingScorer(forward, budget, report, sliding_window(model.network))
    return IsolatingScorer(sharing, padded), report


ScoredInput: TypeAlias = tuple[tuple[int, ...], list[tuple[int, Tokens]]]
"""One input of the network, and the (request index, tokens) continuations that it scores."""


class PaddedScorer:
    """Scores inputs in batches sorted by length; logits are computed only for continuations.

    The softmax is in float32, whatever the model's dtype.
    """

    def __init__(self, model: Model, batches: AdaptiveBatches) -> None:
        self._model = model
        self._network = language_model(model)
        self._batches = batches
        self._cuts_head = "logits_to_keep" in inspect.signature(self._network.forward).parameters

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the results of each batch, longest inputs first."""
        inputs = _group_by_input(requests)
        lengths = [len(tokens) for tokens, _ in inputs]
        for batch in self._batches.map(inputs, self._score, lengths):
            yield [result for results in batch for result in results]

    @torch.no_grad()
    def _score(self, batch: Sequence[ScoredInput]) -> list[Loglikelihoods]:
        """Score one batch, padded on the right."""
        width = len(batch[0][0])
        # Padding on the right needs no attention mask, because attention is causal. Positions start
        # at 0 in every row, as without padding.
        ids_BT = torch.tensor([[*inputs, *[0] * (width - len(inputs))] for inputs, _ in batch])
        longest = [max(len(tokens) for _, tokens in scored) for _, scored in batch]
        # Logits are computed from the first position that any row scores. V is much larger than the
        # hidden width, so logits of other positions would be expensive.
        first = min(len(inputs) - n for (inputs, _), n in zip(batch, longest, strict=True))
        logits_BKV = self._logits(ids_BT.to(self._model.device), width - first)
        results: list[torch.Tensor] = []
        for (inputs, scored), n, logits_KV in zip(batch, longest, logits_BKV, strict=True):
            end = len(inputs) - first
            logp_KV = logits_KV[end - n : end].float().log_softmax(-1)
            results += [_continuation_loglikelihood(logp_KV, tokens) for _, tokens in scored]
        # One transfer from the device per batch instead of one per continuation.
        pairs = iter(torch.stack(results).tolist())
        return [
            [
                (index, Loglikelihood(value, bool(greedy)))
                for (index, _), (value, greedy) in zip(
                    scored, islice(pairs, len(scored)), strict=True
                )
            ]
            for _, scored in batch
        ]

    def _logits(self, ids_BT: torch.Tensor, keep: int) -> torch.Tensor:
        """Return the logits at the last `keep` positions."""
        if self._cuts_head:
            return self._network(ids_BT, logits_to_keep=keep, use_cache=False).logits
        # Remote code may lack the argument for the number of logits.
        return self._network(ids_BT, use_cache=False).logits[:, -keep:]


def _group_by_input(requests: Sequence[LoglikelihoodRequest]) -> list[ScoredInput]:
    """Group continuations by network input, longest first."""
    grouped: dict[tuple[int, ...], list[tuple[int, Tokens]]] = defaultdict(list)
    for index, (inputs, targets) in enumerate(requests):
        # The last token of a continuation is not an input, so choices of one token share an input,
        # as in lm-eval's single-token shortcut.
        grouped[tuple(inputs)].append((index, targets))
    return sorted(grouped.items(), key=lambda item: (-len(item[0]), item[0]))


def _continuation_loglikelihood(logp_KV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Return a continuation's log-likelihood and whether it is greedy, as a tensor of two.

    Its last token is predicted at the input's last token, so its rows are the last ones.
    """
    target_K = torch.tensor(tokens, device=logp_KV.device)
    rows_KV = logp_KV[-len(tokens) :]
    value = rows_KV.gather(1, target_K[:, None]).sum()
    greedy = (rows_KV.argmax(-1) == target_K).all()
    return torch.stack([value, greedy.to(value.dtype)])


class IsolatingScorer:
    """Repeats requests with results that are not finite in separate rows without padding.

    A zero attention weight times NaN is NaN, so a prompt with NaN affects all prompts of the same
    packed sequence, and NaN in the embedding of the padding token all padded rows. Which rows have
    no answer must not depend on the backend.
    """

    def __init__(self, scorer: Scorer, padded: PaddedScorer) -> None:
        self._scorer = scorer
        self._padded = padded

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the finite results of each batch when it is done, then all others."""
        spoiled: list[int] = []
        for batch in self._scorer.score(requests):
            spoiled += [index for index, result in batch if not math.isfinite(result.value)]
            yield [pair for pair in batch if math.isfinite(pair[1].value)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index in spoiled:
            by_length[len(requests[index].inputs)].append(index)
        for indices in by_length.values():
            for batch in self._padded.score([requests[index] for index in indices]):
                yield [(indices[place], result) for place, result in batch]


class DistributedScorer:
    """Scores a shard of the requests with its own scorer, then receives the others' results."""

    def __init__(self, scorer: Scorer, group: ProcessGroup) -> None:
        self._scorer = scorer
        self._group = group

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the results of each batch, those of other processes last."""
        # Sorted by tokens, so that requests with a common prefix are in the same shard; only a
        # prefix at the border of two shards is computed twice.
        order = sorted(range(len(requests)), key=lambda index: requests[index].inputs)

        def score_shard(shard: list[int]) -> Iterator[Loglikelihoods]:
            for batch in self._scorer.score([requests[index] for index in shard]):
                yield [(shard[index], result) for index, result in batch]

        work = [len(requests[index].inputs) for index in order]
        yield from self._group.scatter_work(order, work, score_shard)
