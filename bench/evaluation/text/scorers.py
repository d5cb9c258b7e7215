"""The padded and the distributed scorer, and the choice of one.

The padded backend: one padded row per distinct input, as in lm-eval's `hf` model.

Suffixes: B batch, T padded length, K kept positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch

from bench.evaluation import batching
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.distributed import ProcessGroup, current_process_group
from bench.evaluation.harness import BackendReport
from bench.evaluation.text.requests import (
    Loglikelihood,
    LoglikelihoodRequest,
    Loglikelihoods,
    Scorer,
    Tokens,
)
from bench.models.model import Model
from bench.models.structure.attention_span import sliding_window
from bench.ui import Progress


def select_scorer(
    model: Model, batches: AdaptiveBatches, progress: Progress, asked: BackendReport
) -> Scorer:
    """Return a scorer for a model, and enter it in the backend report `asked`."""
    ranks = current_process_group()
    own = _local_scorer(model, batches, progress, asked)
    return own if ranks.count == 1 else DistributedScorer(own, ranks)


def _local_scorer(
    model: Model, batches: AdaptiveBatches, progress: Progress, asked: BackendReport
) -> Scorer:
    if asked.requested == "padded":
        return PaddedScorer(model, batches)
    from bench.evaluation.text.prefix import support
    from bench.evaluation.text.prefix.forward import Forward
    from bench.evaluation.text.prefix.scorer import PrefixSharingScorer

    reason = support.unsupported_reason(model)
    if reason is not None:
        asked.add_reason(reason)
        progress.console.print(f"[yellow]{model.name} uses the padded backend: {reason}[/]")
        return PaddedScorer(model, batches)
    found = batching.estimate_token_budget(model.network, model.device, progress)
    asked.used, asked.tokens_per_batch = "prefix_sharing", found.tokens
    forward = Forward(model.network, model.device)
    return PrefixSharingScorer(forward, found, asked, sliding_window(model.network))


ScoredInput: TypeAlias = tuple[tuple[int, ...], list[tuple[int, Tokens]]]
"""One input of the network, and the (request index, tokens) continuations that it scores."""


class PaddedScorer:
    """Scores inputs in batches sorted by length; only positions of continuations meet the head.

    Softmax is in float32 whatever the model's dtype.
    """

    def __init__(self, model: Model, batches: AdaptiveBatches) -> None:
        self._model = model
        self._network: Any = model.network
        self._batches = batches
        self._cuts_head = "logits_to_keep" in inspect.signature(self._network.forward).parameters

    def score(self, questions: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the responses of each batch, longest inputs first."""
        for batch in self._batches.each(_group_by_input(questions), self._score):
            yield [answer for answers in batch for answer in answers]

    @torch.no_grad()
    def _score(self, batch: Sequence[ScoredInput]) -> list[Loglikelihoods]:
        """Score one batch, padded on the right."""
        width = len(batch[0][0])
        # Padding on the right needs no attention mask: under causal attention no token sees what
        # follows it. Positions count from 0 in every row, as without padding.
        ids_BT = torch.tensor([[*inputs, *[0] * (width - len(inputs))] for inputs, _ in batch])
        longest = [max(len(tokens) for _, tokens in asked) for _, asked in batch]
        # The smallest position that any row of the batch scores; from there on logits are computed.
        # The head then meets few positions, which matters because V is far larger than the hidden
        # width.
        first = min(len(inputs) - n for (inputs, _), n in zip(batch, longest, strict=True))
        logits_BKV = self._logits(ids_BT.to(self._model.device), width - first)
        read: list[torch.Tensor] = []
        for (inputs, asked), n, logits_KV in zip(batch, longest, logits_BKV, strict=True):
            end = len(inputs) - first
            logp_KV = logits_KV[end - n : end].float().log_softmax(-1)
            read += [_continuation_loglikelihood(logp_KV, tokens) for _, tokens in asked]
        # One transfer from the device per batch; a transfer per continuation would synchronize it.
        pairs = iter(torch.stack(read).tolist())
        return [
            [
                (number, Loglikelihood(value, bool(greedy)))
                for (number, _), (value, greedy) in zip(
                    asked, islice(pairs, len(asked)), strict=True
                )
            ]
            for _, asked in batch
        ]

    def _logits(self, ids_BT: torch.Tensor, keep: int) -> torch.Tensor:
        """Return the logits at the last `keep` positions."""
        if self._cuts_head:
            logits: torch.Tensor = self._network(
                ids_BT, logits_to_keep=keep, use_cache=False
            ).logits
            return logits
        # Remote code may lack the argument: all logits are computed, then cut.
        every: torch.Tensor = self._network(ids_BT, use_cache=False).logits
        return every[:, -keep:]


def _group_by_input(questions: Sequence[LoglikelihoodRequest]) -> list[ScoredInput]:
    """Group continuations by network input, longest first."""
    grouped: dict[tuple[int, ...], list[tuple[int, Tokens]]] = defaultdict(list)
    for number, (inputs, targets) in enumerate(questions):
        # The last token of a continuation is no input, so choices of one token have the same input,
        # as in lm-eval's single-token shortcut.
        grouped[tuple(inputs)].append((number, targets))
    return sorted(grouped.items(), key=lambda each: (-len(each[0]), each[0]))


def _continuation_loglikelihood(logp_KV: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Return a continuation's log-likelihood and whether it is greedy, as a tensor of two.

    Its last token is predicted at the input's last token, so its rows are the last ones.
    """
    target_K = torch.tensor(tokens, device=logp_KV.device)
    rows_KV = logp_KV[-len(tokens) :]
    value = rows_KV.gather(1, target_K[:, None]).sum()
    greedy = (rows_KV.argmax(-1) == target_K).all()
    return torch.stack([value, greedy.to(value.dtype)])


class DistributedScorer:
    """Scores a share of the requests with its own scorer, then receives the others' responses."""

    def __init__(self, scorer: Scorer, ranks: ProcessGroup) -> None:
        self._scorer = scorer
        self._ranks = ranks

    def score(self, questions: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the responses of each batch, those of other processes last."""
        # Sorted by tokens, so that a contiguous share keeps requests with a common prefix together:
        # a prefix cut by a border is computed twice, all others once.
        order = sorted(range(len(questions)), key=lambda number: questions[number].inputs)

        def own(mine: list[int]) -> Iterator[Loglikelihoods]:
            for batch in self._scorer.score([questions[number] for number in mine]):
                yield [(mine[place], answer) for place, answer in batch]

        work = [len(questions[number].inputs) for number in order]
        yield from self._ranks.spread(order, work, own)
