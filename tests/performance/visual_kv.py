"""Bytes of the split cache against the arithmetic of keys and values that somebody reads."""

from __future__ import annotations

from typing import Any, cast

import torch

from methods.visual_tokens.cache import Ledger, cache_bytes
from methods.visual_tokens.cost import Prompt
from methods.visual_tokens.cost import cache_bytes as expected_bytes
from methods.visual_tokens.work import shape_of, work_of
from methods.visual_tokens.yopo import Shares, Yopo
from tests.performance.figure import Figure
from tests.performance.visual_prefill import AFTER, BEFORE, PRESET, SIDE, applied, call, network

PRESETS = {
    "yopo_12": PRESET,
    "yopo_25": Shares(label="25%", heads=0.75, layers=0.5, neurons=0.5, window=5),
}


def figures() -> list[Figure]:
    """Every byte that a prefill leaves in the cache, places of its tokens included."""
    return [_bytes(name, row) for name, row in PRESETS.items()]


def _bytes(name: str, row: Shares) -> Figure:
    net = network(torch.float32)
    engine = applied(Yopo(shares=row, heads="random", neurons="random"), net)
    with torch.no_grad():
        cache: Any = net(**call(torch.float32)).past_key_values
    ledger = cast(Ledger, cache.layers[0].ledger)
    places = (ledger.text, *ledger.visual)
    parts = [part for kind in places for part in (kind.index_BR, kind.valid_BR)]
    held = cache_bytes(cache) + sum(part.numel() * part.element_size() for part in parts)
    lengths = Prompt(SIDE**2, BEFORE, BEFORE + AFTER, SIDE**2)
    wanted = expected_bytes(shape_of(engine), work_of(engine), lengths, element=4)
    dense = 2 * 4 * 1024 * 16 * (SIDE**2 + BEFORE + AFTER)
    value = held / wanted
    how = f"{held / 1e6:.2f} MB held, {wanted / 1e6:.2f} MB by arithmetic, dense {dense / 1e6:.2f}"
    return Figure(
        f"{name} cache bytes / arithmetic", value, "within 2 %", abs(value - 1) <= 0.02, how
    )
