"""From logits to log-likelihoods of targets, accumulated over batches.

Suffixes: R positions read, V vocabulary, K targets, several of which may share a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.evaluation.text.question import Answers, Question, Scored
from bench.evaluation.text.shared.rows import Place

CHUNK = 512
"""Positions whose log-probabilities exist in float32 at one time."""


def targets_read(logits_RV: Tensor, row_K: Tensor, target_K: Tensor) -> NDArray[np.float64]:
    """Return log-probabilities and greedy flags, [2, K]; `row_K` must be sorted."""
    # Since `row_K` is sorted, the targets of a chunk of positions are one slice. Chunks bound the
    # float32 copy of the logits, which would otherwise be the largest tensor of the forward.
    found: list[Tensor] = [torch.empty(2, 0, device=logits_RV.device)]
    bounds = torch.searchsorted(row_K, torch.arange(0, len(logits_RV) + CHUNK, CHUNK)).tolist()
    parts = logits_RV.split(CHUNK)
    for number, (part_RV, low, high) in enumerate(zip(parts, bounds, bounds[1:], strict=False)):
        logp_RV = part_RV.float().log_softmax(-1)
        row_k = (row_K[low:high] - number * CHUNK).to(logp_RV.device)
        target_k = target_K[low:high].to(logp_RV.device)
        greedy_k = logp_RV.argmax(-1)[row_k] == target_k
        found.append(torch.stack([logp_RV[row_k, target_k], greedy_k.to(logp_RV.dtype)]))
    values_2K: NDArray[np.float64] = torch.cat(found, dim=1).cpu().double().numpy()
    return values_2K


class Tally:
    """Adds up the parts of each request's log-likelihood until the request is complete."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._left = np.array([len(targets) for _, targets in questions])
        self._value = np.zeros(len(questions))
        self._greedy = np.ones(len(questions), dtype=bool)

    def add(self, asked: Sequence[Place], values_2K: NDArray[np.float64]) -> Answers:
        """Add the targets of some reads, in their order; return the requests now complete."""
        if not asked:
            return []
        counts = np.array([len(place.targets) for place in asked])
        first = np.cumsum(counts) - counts
        value = np.add.reduceat(values_2K[0], first)
        greedy = np.logical_and.reduceat(values_2K[1] > 0, first)
        numbers = np.array([place.number for place in asked])
        # `+=` with an index array drops repetitions, but there are none: the path of a request is
        # in one sequence of a batch, and a prefix is a batch of its own.
        self._value[numbers] += value
        self._greedy[numbers] &= greedy
        self._left[numbers] -= counts
        whole = numbers[self._left[numbers] == 0]
        pairs = zip(self._value[whole].tolist(), self._greedy[whole].tolist(), strict=True)
        return [(n, Scored(*pair)) for n, pair in zip(whole.tolist(), pairs, strict=True)]
