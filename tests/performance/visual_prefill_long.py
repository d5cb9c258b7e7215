"""At 2,880 visual tokens, five images of 24 x 24, windows pay without any other strategy."""

from __future__ import annotations

import copy

import torch

from methods.visual_tokens.strategies import NeighborAttention
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times
from tests.performance.visual_prefill import THREADS, applied, call, network, prefill, theory

IMAGES, LAYERS = 5, 4


def figures() -> list[Figure]:
    """Dense prefill time over that with a 5 x 5 window, in each precision."""
    torch.set_num_threads(THREADS)
    return [_window(dtype) for dtype in (torch.float32, torch.bfloat16)]


def _window(dtype: torch.dtype) -> Figure:
    dense = network(dtype, LAYERS)
    ours = copy.deepcopy(dense)
    expected = theory(applied(NeighborAttention(window=5), ours), IMAGES)
    inputs = call(dtype, IMAGES)
    slow, fast = times([prefill(dense, inputs), prefill(ours, inputs)], rounds=5)
    gain, middle = ratio(slow, fast)
    how = (
        f"minima of 5; medians {middle:.2f}; theory {expected:.2f} with attention charged in "
        f"full, dense {min(slow):.2f} s, {LAYERS} layers, {THREADS} thread"
    )
    name = f"window over dense at 2880 visual tokens, {str(dtype).removeprefix('torch.')}"
    return Figure(name, gain, ">= 1.05", gain >= 1.05, how)
