"""Bytes of the split cache against the arithmetic of keys and values that somebody reads."""

from __future__ import annotations

from typing import Any, cast

import torch

from bench.measurement.model_size import kv_cache_bytes
from methods.visual_engine.cost.closed_form import PromptLengths
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.kv_cache import CachedTokens
from methods.visual_tokens.yopo import PaperRow, Yopo
from tests.methods.visual_engine.cache_sizes import expected_cache_bytes
from tests.performance.figure import Figure
from tests.performance.visual_prefill import AFTER, BEFORE, PRESET, SIDE, applied, call, network

PRESETS = {
    "yopo_12": PRESET,
    "yopo_25": PaperRow(label="25%", heads=0.75, layers=0.5, neurons=0.5, window=5),
}


def figures() -> list[Figure]:
    """Every byte that a prefill leaves in the cache, places of its tokens included."""
    return [_bytes(name, row) for name, row in PRESETS.items()]


def _bytes(name: str, row: PaperRow) -> Figure:
    net = network(torch.float32)
    engine = applied(Yopo(shares=row, heads="random", neurons="random"), net)
    with torch.no_grad():
        cache: Any = net(**call(torch.float32)).past_key_values
    cached_tokens = cast(CachedTokens, cache.layers[0].cached_tokens)
    places = (cached_tokens.text, *cached_tokens.visual)
    parts = [part for kind in places for part in (kind.index_BR, kind.valid_BR)]
    held = kv_cache_bytes(cache) + sum(part.numel() * part.element_size() for part in parts)
    lengths = PromptLengths(SIDE**2, BEFORE, BEFORE + AFTER, SIDE**2)
    wanted = expected_cache_bytes(decoder_shape(engine), layer_costs(engine), lengths, element=4)
    dense = 2 * 4 * 1024 * 16 * (SIDE**2 + BEFORE + AFTER)
    value = held / wanted
    how = f"{held / 1e6:.2f} MB held, {wanted / 1e6:.2f} MB by arithmetic, dense {dense / 1e6:.2f}"
    return Figure(
        f"{name} cache bytes / arithmetic", value, "within 2 %", abs(value - 1) <= 0.02, how
    )
