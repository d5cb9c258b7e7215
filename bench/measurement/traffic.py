"""Minimum bytes that a call must read: the weights of all modules that run in it, each once.

This is a lower bound, so that the share of the roofline is never overstated: of E routed experts
only the k of a single token are charged; embeddings and activations are not charged at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from bench.measurement.size import top_k
from bench.models.own import OwnModule

if TYPE_CHECKING:
    from bench.models.anatomy import Anatomy


def bytes_read(
    network: nn.Module, anatomy: Anatomy, call: Callable[[Callable[[], None]], object]
) -> float:
    """Return the minimum number of weight bytes that a call of the network reads.

    `call` receives a function that discards the modules recorded so far.
    """
    share = _expert_shares(network, anatomy)
    with _ran(network) as ran:
        call(ran.clear)
    # By identity of the tensor, so that tied weights are charged once.
    weights = {
        id(tensor): tensor.numel() * tensor.element_size() * share.get(module, 1.0)
        for module in ran
        if not isinstance(module, nn.Embedding)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(weights.values())


@contextmanager
def _ran(network: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules whose forward runs inside the block."""
    seen: set[nn.Module] = set()

    def see(module: nn.Module, _: object) -> None:
        seen.add(module)

    hooks = [module.register_forward_pre_hook(see) for module in network.modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _expert_shares(network: nn.Module, anatomy: Anatomy) -> dict[nn.Module, float]:
    """Map every module with routed experts to the share of its weights that one token uses.

    Modules in which a method replaced the experts report themselves what is routed.
    """
    if anatomy.blocks:
        return {
            module: block.top_k / block.num_experts
            for block in anatomy.blocks
            for module in block.experts.modules()
        }
    shares: dict[nn.Module, float] = {}
    for own in network.modules():
        told = own.routed() if isinstance(own, OwnModule) else None
        if told is not None:
            routed, experts = told
            # Not all weights of a replaced module are routed, so k/E does not apply to the whole:
            # subtract what a token leaves unused. One share holds for all its submodules.
            idle = routed * (1 - top_k(network) / experts)
            share = 1 - idle / sum(weight.numel() for weight in own.parameters())
            shares |= dict.fromkeys(own.modules(), share)
    return shares
