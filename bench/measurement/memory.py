"""Memory of a model: weights on disk, KV cache per token, and the peak of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.device.memory import Peak
from bench.measurement.cache import held
from bench.measurement.cost import Cost
from bench.measurement.rows import Rows
from bench.measurement.stages import DECODE, FORWARD, PREFILL
from bench.measurement.workload import Answering, Workload

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model


@torch.no_grad()
def rows(model: Model, work: Workload) -> Rows:
    """Yield the peak memory of each stage and the size of the KV cache, from separate calls.

    A peak is the size of the weights plus what the call allocated on top of the memory in use
    before it, as if the model were alone: the dense model loaded next to it does not count.
    """
    inputs, network = work.on(model.device), model.network
    with Peak(model.device) as peak:
        made = work.forward(network, inputs)
    if not isinstance(work, Answering):
        yield _peak(network, f"{FORWARD} {work.shape}", peak)
        return
    prefill, decode = f"{PREFILL} {work.shape}", f"{DECODE} {work.shape}"
    yield _peak(network, prefill, peak)
    filled = held(made.past_key_values)
    # The cache of the prefill must be gone before the next baseline is taken.
    del made
    with Peak(model.device) as peak:
        # Restart after the first token, so that the peak of the prefill is not charged to decoding.
        cache = work.answer(network, inputs, lambda n: peak.restart() if n == 1 else None)
    yield _peak(network, decode, peak)
    yield Cost(prefill, "cache_bytes", "B", filled, "counted")
    # The last generated token is never fed back, so the cache grows by new_tokens - 1.
    each = (held(cache) - filled) / (work.new_tokens - 1) / work.batch
    yield Cost(decode, "cache_bytes_per_token", "B", each, "counted")


def disk_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights in safetensors files, with tied weights counted once."""
    # Tied tensors share storage; empty and meta tensors have no address, so they go by identity.
    kept = {
        (tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)): tensor
        for tensor in network.state_dict(keep_vars=True).values()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _peak(network: nn.Module, scope: str, peak: Peak) -> Cost:
    tensors = (*network.parameters(), *network.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parts = {"weights": float(weights), "above": float(peak.above)}
    return Cost(scope, "peak_bytes", "B", weights + peak.above, "measured", parts, peak.how)
