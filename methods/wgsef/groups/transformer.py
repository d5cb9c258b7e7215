"""Groups of transformers: FFN neurons, attention heads, whole experts and micro-experts.

Shapes: E experts of a layer, I hidden neurons of an FFN.

Layouts are those of transformers: `gate_proj`/`up_proj`/`down_proj` linears, `q/k/v/o_proj`
linears, and experts fused into `gate_up_proj` [E, 2 I, D] and `down_proj` [E, D, I].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from bench.errors import UserError
from methods.wgsef.groups.partition import GroupFamily, Slice

_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def neurons(network: nn.Module) -> list[GroupFamily]:
    """Return the hidden neurons of every dense FFN: rows of gate and up, columns of down.

    Raises:
        UserError: the network has no such FFN.
    """
    families = _families(network, _FFN_PROJECTIONS, _neuron_family)
    return _require_families(families, network, "FFN with gate_proj, up_proj and down_proj")


def heads(network: nn.Module) -> list[GroupFamily]:
    """Return attention heads; with grouped queries a KV head and its query heads are one group.

    A group owns rows of q, k and v, their biases, and columns of o.

    Raises:
        UserError: the network has no such attention.
    """
    families = _families(network, _ATTENTION_PROJECTIONS, _head_family)
    return _require_families(families, network, "attention with q_proj, k_proj, v_proj and o_proj")


def experts(network: nn.Module) -> list[GroupFamily]:
    """Return whole routed experts, one family per layer; the router keeps its outputs.

    Raises:
        UserError: the network has no fused experts.
    """
    reason = "the router still selects a zeroed expert; removing it would reroute its tokens"
    families = []
    for name, count, _ in _fused_experts(network):
        owned = (
            Slice.whole(f"{name}.gate_up_proj", (0,), count),
            Slice.whole(f"{name}.down_proj", (0,), count),
        )
        families.append(GroupFamily(name, "experts", count, owned, unremovable_reason=reason))
    return _require_families(families, network, "fused experts")


def micro_experts(network: nn.Module) -> list[GroupFamily]:
    """Return the hidden neurons of routed experts, one family per layer for all of its experts.

    Raises:
        UserError: the network has no fused experts.
    """
    reason = "the experts of a layer are one tensor; use a micro-expert pruning method to cut them"
    families = []
    for name, count, hidden in _fused_experts(network):
        # Units number (expert, row) pairs flattened over axes (0, 1). `gate_up_proj` stacks I gate
        # rows and I up rows per expert, so neuron i of expert e has the units 2 I e + i and 2 I e +
        # I + i; in `down_proj` it is the column I e + i over axes (0, 2).
        expert_R = torch.arange(count).repeat_interleave(hidden)
        neuron_R = torch.arange(hidden).repeat(count)
        group_R = expert_R * hidden + neuron_R
        gate_R = expert_R * 2 * hidden + neuron_R
        fused = Slice(
            f"{name}.gate_up_proj",
            (0, 1),
            torch.cat([gate_R, gate_R + hidden]),
            torch.cat([group_R, group_R]),
        )
        down = Slice(f"{name}.down_proj", (0, 2), group_R, group_R)
        family = GroupFamily(
            name, "micro_experts", count * hidden, (fused, down), unremovable_reason=reason
        )
        families.append(family)
    return _require_families(families, network, "fused experts")


def _families(
    network: nn.Module,
    projections: tuple[str, ...],
    make_family: Callable[[str, nn.Module], GroupFamily],
) -> list[GroupFamily]:
    """Make a family of every module that has these linear layers."""
    return [
        make_family(name, module)
        for name, module in network.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in projections)
    ]


def _neuron_family(name: str, module: nn.Module) -> GroupFamily:
    gate, up, down = (module.get_submodule(part) for part in _FFN_PROJECTIONS)
    assert isinstance(down, nn.Linear)
    owned = [
        Slice.whole(f"{name}.{part}.{key}", (0,), down.in_features)
        for part, layer in (("gate_proj", gate), ("up_proj", up))
        for key, _ in layer.named_parameters()
    ]
    owned.append(Slice.whole(f"{name}.down_proj.weight", (1,), down.in_features))
    return GroupFamily(name, "neurons", down.in_features, tuple(owned))


def _head_family(name: str, attention: nn.Module) -> GroupFamily:
    q_proj, k_proj = (attention.get_submodule(part) for part in ("q_proj", "k_proj"))
    assert isinstance(q_proj, nn.Linear) and isinstance(k_proj, nn.Linear)
    width = cast(int, attention.head_dim)
    count = k_proj.out_features // width
    # Rows of q per KV head: its query heads are consecutive, which is the order in which
    # transformers' `repeat_kv` pairs them.
    queries = q_proj.out_features // count
    owned = [
        Slice.whole(f"{name}.{part}.{key}", (0,), count, queries if part == "q_proj" else width)
        for part in ("q_proj", "k_proj", "v_proj")
        for key, _ in attention.get_submodule(part).named_parameters()
    ]
    owned.append(Slice.whole(f"{name}.o_proj.weight", (1,), count, queries))
    return GroupFamily(name, "heads", count, tuple(owned))


def _fused_experts(network: nn.Module) -> list[tuple[str, int, int]]:
    """Return name, number of experts and hidden width of each module of fused experts."""
    found = []
    for name, module in network.named_modules():
        gate_up = getattr(module, "gate_up_proj", None)
        # A dense fused FFN also has a `gate_up_proj`, but as a linear layer and not as a 3-D
        # parameter.
        if isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3:
            found.append((name, gate_up.shape[0], gate_up.shape[1] // 2))
    return found


def _require_families(
    families: list[GroupFamily], network: nn.Module, what: str
) -> list[GroupFamily]:
    if not families:
        raise UserError(f"{type(network).__name__} has no {what}")
    return families
