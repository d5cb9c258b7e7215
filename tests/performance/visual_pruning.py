"""Prefill of token pruning against dense, and what choosing costs, on the LLaVA of visual_prefill.

The same network, back end and cache. Theory is the ratio of counted FLOPs of everything that runs,
choosing apart; the time of choosing is that of the engine's own clock.
"""

from __future__ import annotations

import copy
import statistics

import torch

from methods.token_pruning.base import TokenPruning
from methods.token_pruning.controls import RandomTokens
from methods.token_pruning.dart import DART
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.sparsevlm import SparseVLM
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times
from tests.performance.visual_prefill import THREADS, applied, call, network, prefill, theory

ROUNDS = 5

# Of 16 layers and 576 tokens, each at about a quarter of the tokens; the control first.
METHODS: tuple[TokenPruning, ...] = (
    RandomTokens(keep=144),
    FastV(after=2, keep=None, average=0.25),
    PyramidDrop(average=0.4),
    SparseVLM(average=128),
    DART(after=2, keep=None, average=0.25),
    DivPrune(keep=144),
)


def figures() -> list[Figure]:
    """Realised share of the theoretical gain, and choosing as a share of the dense prefill."""
    torch.set_num_threads(THREADS)
    return [figure for method in METHODS for figure in _measured(method)]


def _measured(method: TokenPruning) -> list[Figure]:
    dense, inputs = network(torch.float32), call(torch.float32)
    ours = copy.deepcopy(dense)
    engine = applied(method, ours)
    expected, pruned, choosing = theory(engine), prefill(ours, inputs), list[float]()

    def timed() -> None:
        with engine.overhead.measured() as overhead:
            pruned()
        choosing.append(overhead.seconds)

    slow, fast = times([prefill(dense, inputs), timed], rounds=ROUNDS)
    gain, middle = ratio(slow, fast)
    name, seconds = type(method).__name__, statistics.median(choosing)
    share = seconds / statistics.median(slow)
    how = (
        f"{gain:.2f}x by minima of {ROUNDS}, {middle:.2f}x by medians, of {expected:.2f}x fewer "
        f"FLOPs; dense {min(slow):.2f} s, {THREADS} thread"
    )
    value = gain / expected
    told = f"{1000 * seconds:.1f} ms a prefill, median"
    return [
        Figure(f"{name} share of theory", value, ">= 0.8", value >= 0.8, how),
        Figure(f"{name} choosing / dense prefill", share, "<= 0.05", share <= 0.05, told),
    ]
