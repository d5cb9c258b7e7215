"""The fewest bytes that a call must read: the weights of all modules that run in it, each once.

A lower bound, so that a share of the device's limit is never overstated: of E routed experts only
the k that a single token meets are charged, of an embedding nothing, activations are left out.
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
    """Return the bytes of weights that a call of the network reads at least.

    The call is handed a function that forgets what has run so far.
    """
    share = _expert_shares(network, anatomy)
    with _ran(network) as ran:
        call(ran.clear)
    weights = {
        id(tensor): tensor.numel() * tensor.element_size() * share.get(module, 1.0)
        for module in ran
        if not isinstance(module, nn.Embedding)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(weights.values())


@contextmanager
def _ran(network: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the modules whose forward runs while the block lasts."""
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
    """Return, for every module with routed experts, which share of its weights one token meets.

    Experts in a form that the anatomy does not know say themselves what of them is routed.
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
            idle = routed * (1 - top_k(network) / experts)
            share = 1 - idle / sum(weight.numel() for weight in own.parameters())
            shares |= dict.fromkeys(own.modules(), share)
    return shares
