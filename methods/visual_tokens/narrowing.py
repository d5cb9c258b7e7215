"""A mixture-of-experts block with fewer neurons per expert that shares everything else.

Experts may keep different numbers of neurons, as they do after other methods have removed some.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from bench.models.anatomy import MoEBlock
from bench.models.anatomy.expert import PROJECTIONS
from bench.models.anatomy.ragged import RaggedExperts

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def narrowed(block: MoEBlock, places: Sequence[Tensor]) -> nn.Module:
    """Return the block with the neurons at `places` of each expert, routed experts first.

    Router and gates are the block's own modules; expert weights are copies of what is kept.
    """
    twin = _twin(block.block)
    _exchange(twin, block.experts, _routed(block, places[: block.num_experts]))
    if block.shared is not None:
        _exchange(twin, block.shared, _gated(block.shared, places[block.num_experts]))
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module so that its children can be exchanged; the children themselves are shared."""
    # `copy.copy` shares the dictionaries of modules, parameters and hooks with the original, so an
    # exchanged child would appear in both. The twin gets dictionaries of its own: it shares
    # weights, not structure. Its hooks start empty, since an observer of the block must not count
    # the narrowed pass.
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__["_parameters"] = dict(module._parameters)
    for name in HOOKS:
        twin.__dict__[name] = type(getattr(module, name))()
    return twin


def _exchange(twin: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, part in twin._modules.items() if part is old)
    twin._modules[name] = new


def _routed(block: MoEBlock, places: Sequence[Tensor]) -> RaggedExperts:
    """Return the routed experts with their kept neurons, however they are stored."""
    old = [block.expert(index) for index in range(block.num_experts)]
    widths = [len(kept) for kept in places]
    like = next(block.experts.parameters())
    narrow = RaggedExperts(
        widths, block.d_model, old[0].act, dtype=like.dtype, device=like.device
    ).requires_grad_(False)
    for index, (view, kept) in enumerate(zip(old, places, strict=True)):
        new, chosen = narrow.view(index), kept.to(like.device)
        new.gate.copy_(view.gate[chosen])
        new.up.copy_(view.up[chosen])
        new.down.copy_(view.down[:, chosen])
    return narrow


def _gated(module: nn.Module, kept: Tensor) -> nn.Module:
    twin = _twin(module)
    names = next(names for names in PROJECTIONS if hasattr(module, names[0]))
    for name, dim in zip(names, (0, 0, 1), strict=True):
        weight = cast(nn.Linear, getattr(module, name)).weight.detach()
        twin._modules[name] = _linear(weight.index_select(dim, kept.to(weight.device)))
    return twin


def _linear(weight: Tensor) -> nn.Linear:
    # Created on the meta device: no memory is allocated or initialised for a weight that is
    # replaced at once.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
