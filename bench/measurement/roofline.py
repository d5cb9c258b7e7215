"""Roofline of a device: its measured peak rates, and the minimum time of a call.

A call takes at least its FLOPs at the rate of a large matmul, and at least its bytes at the
bandwidth of a large copy (roofline model: Williams, Waterman, Patterson, CACM 2009).

The bytes are the weights of all modules that run in a call, counted once. This is a lower bound, so
that the share of the roofline is never overstated: of E routed experts only the k of a single token
count, and embeddings and activations do not count at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.device.devices import call_seconds
from bench.measurement.model_size import experts_per_token
from bench.models.replaced_modules import ReplacedModule

if TYPE_CHECKING:
    from bench.models.structure.model_structure import ModelStructure

REPEATS = 5
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices, large enough for the matmul to be limited by compute."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
"""Bytes of the copy: many times the size of any cache."""


@dataclass(frozen=True)
class DeviceLimits:
    """FLOP/s of a matmul, and bytes/s of a copy, counting both read and written bytes."""

    matrix_rate: float
    bandwidth: float

    def min_seconds(self, flops: float, bytes: float) -> float:
        """Return the minimum time of a call with these FLOPs and bytes."""
        # The maximum instead of the sum, because compute and memory traffic can overlap completely.
        return max(flops / self.matrix_rate, bytes / self.bandwidth)


@functools.cache
def device_limits(device: torch.device, dtype: torch.dtype, threads: int) -> DeviceLimits:
    """Measure a device's limits for one dtype, once per process, as the best of five calls.

    `threads` is torch's number of CPU threads; it is part of the cache key because CPU limits
    depend on it.
    """
    side, copied = MATRIX_SIDE[device.type], COPY_BYTES[device.type]
    a_NN = torch.ones(side, side, dtype=dtype, device=device)
    product_NN = torch.empty_like(a_NN)
    rate = 2 * side**3 / fastest_seconds(device, lambda: torch.mm(a_NN, a_NN, out=product_NN))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return DeviceLimits(rate, 2 * copied / fastest_seconds(device, lambda: target.copy_(source)))


def fastest_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, after a warm-up call."""
    # The fastest, because a limit must not be understated: a share of it could exceed 1.
    call()
    return min(call_seconds(call, device) for _ in range(REPEATS))


def weight_bytes_read(
    network: nn.Module, structure: ModelStructure, call: Callable[[Callable[[], None]], object]
) -> float:
    """Return the minimum number of weight bytes that a call of the network reads.

    `call` receives a function that discards the modules recorded so far.
    """
    share = _active_expert_shares(network, structure)
    with _executed_modules(network) as executed:
        call(executed.clear)
    # By identity of the tensor, so that tied weights count once.
    weights = {
        id(tensor): tensor.numel() * tensor.element_size() * share.get(module, 1.0)
        for module in executed
        if not isinstance(module, nn.Embedding)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(weights.values())


@contextmanager
def _executed_modules(network: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules whose forward runs inside the block."""
    executed: set[nn.Module] = set()

    def record(module: nn.Module, _: object) -> None:
        executed.add(module)

    hooks = [module.register_forward_pre_hook(record) for module in network.modules()]
    try:
        yield executed
    finally:
        for hook in hooks:
            hook.remove()


def _active_expert_shares(network: nn.Module, structure: ModelStructure) -> dict[nn.Module, float]:
    """Map every module with routed experts to the share of its weights that one token uses.

    Modules in which a method replaced the experts report how many weights are routed.
    """
    if structure.blocks:
        return {
            module: block.top_k / block.num_experts
            for block in structure.blocks
            for module in block.experts.modules()
        }
    shares: dict[nn.Module, float] = {}
    for module in network.modules():
        counts = module.routed_parameters() if isinstance(module, ReplacedModule) else None
        if counts is not None:
            routed, experts = counts
            # In a replaced module only some weights are routed, so k/E does not apply to all of
            # them: subtract what a token does not use. All submodules have the same share.
            idle = routed * (1 - experts_per_token(network) / experts)
            share = 1 - idle / sum(weight.numel() for weight in module.parameters())
            shares |= dict.fromkeys(module.modules(), share)
    return shares
