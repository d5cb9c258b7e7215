"""Groups of transformers: FFN neurons, attention heads, whole experts and micro-experts.

Shapes: E experts of a layer, I hidden neurons of an FFN.

The layouts are those of transformers: dense feed-forwards and attention as found by `dense_layer`,
and experts fused into `gate_up_proj` [E, 2 I, D] and `down_proj` [E, D, I].
"""

from __future__ import annotations

import torch
from torch import nn

from bench.errors import UserError
from bench.models.classifiers.pruned_modules import ATTENTION
from bench.models.structure.dense_layer import (
    FeedForward,
    Heads,
    bias_of,
    feed_forwards,
    find_heads,
    is_transposed,
)
from methods.wgsef.groups.partition import GroupFamily, Slice


def neurons(network: nn.Module) -> list[GroupFamily]:
    """Return the hidden neurons of every dense FFN: rows of gate and up, columns of down.

    In a network that also has gated FFNs, plain ones belong to other parts, such as a vision tower,
    and are left out.

    Raises:
        UserError: the network has no FFN of a known form.
    """
    names = {module: name for name, module in network.named_modules()}
    found = feed_forwards(network)
    gated = [part for part in found if part.form != "plain"]
    families = [_neuron_family(names[part.owner], part) for part in gated or found]
    return _require_families(families, network, "FFN of a known form")


def heads(network: nn.Module) -> list[GroupFamily]:
    """Return attention heads; in grouped-query attention a group is a KV head with its queries.

    A group owns rows of q, k and v, their biases, and columns of o.

    Raises:
        UserError: the network has no attention of a known layout, or heads that cannot be removed.
    """
    names = {module: name for name, module in network.named_modules()}
    families = [_head_family(names[part.owner], part) for part in find_heads(network)]
    return _require_families(families, network, "attention of a known layout")


def attention_heads(network: nn.Module) -> list[GroupFamily]:
    """Return the heads of every `torch.nn.MultiheadAttention`, as in vision transformers.

    A group owns a head's rows of the stacked q, k and v, their biases, and its columns of the
    output projection.

    Raises:
        UserError: the network has no such attention, or one of an unsupported layout.
    """
    families = []
    for name, attention in network.named_modules():
        if not isinstance(attention, ATTENTION):
            continue
        if attention.in_proj_weight is None or getattr(attention, "bias_k", None) is not None:
            raise UserError(
                f"the heads of {name} are not understood: its keys or values have their own widths "
                "or biases; choose groups other than heads"
            )
        count, width = attention.num_heads, attention.head_dim
        # The rows of all queries come first, then those of all keys and of all values.
        group_R = torch.arange(count).repeat_interleave(width).repeat(3)
        owned = [
            Slice(f"{name}.{key}", (0,), torch.arange(len(group_R)), group_R)
            for key in ("in_proj_weight", "in_proj_bias")
            if getattr(attention, key) is not None
        ]
        owned.append(Slice.whole(f"{name}.out_proj.weight", (1,), count, width))
        families.append(GroupFamily(name, "heads", count, tuple(owned)))
    return _require_families(families, network, "heads of torch's MultiheadAttention")


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
        # In `gate_up_proj`, units are (expert, row) pairs flattened over axes (0, 1), with I gate
        # rows and then I up rows per expert, so neuron i of expert e has the units 2 I e + i and
        # 2 I e + I + i. In `down_proj` it is unit I e + i over axes (0, 2).
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


def _neuron_family(name: str, feed_forward: FeedForward) -> GroupFamily:
    where = f"{name}." if name else ""
    neuron_R = torch.arange(feed_forward.width)
    # A fused matrix has the gate's rows first and then those of up, in the same order.
    group_R = neuron_R.repeat(2) if feed_forward.form == "fused" else neuron_R
    owned = [
        Slice(f"{where}{part}.{key}", (axis,), torch.arange(len(group_R)), group_R)
        for part, source in zip(feed_forward.inputs, feed_forward.sources, strict=True)
        for key, axis in (("weight", _row_axis(source)), ("bias", 0))
        if getattr(source, key) is not None
    ]
    columns = 1 - _row_axis(feed_forward.down)
    owned.append(
        Slice.whole(f"{where}{feed_forward.output}.weight", (columns,), feed_forward.width)
    )
    return GroupFamily(name, "neurons", feed_forward.width, tuple(owned))


def _row_axis(projection: nn.Module) -> int:
    return 1 if is_transposed(projection) else 0


def _head_family(name: str, attention: Heads) -> GroupFamily:
    reason = attention.reason_to_stay
    if reason is not None:
        raise UserError(f"{type(attention.owner).__name__} {reason}")
    owned = [
        Slice(f"{name}.{part}.{key}", (axis,), torch.arange(len(group_R)), group_R)
        for part, source, group_R in zip(
            attention.inputs, attention.sources, attention.group_rows, strict=True
        )
        for key, axis in (("weight", _row_axis(source)), ("bias", 0))
        if key == "weight" or bias_of(source) is not None
    ]
    columns = 1 - _row_axis(attention.readout)
    owned.append(
        Slice.whole(
            f"{name}.{attention.output}.weight", (columns,), attention.groups, attention.queries
        )
    )
    return GroupFamily(name, "heads", attention.groups, tuple(owned))


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
