"""FFN neurons and attention heads of dense decoder layers: finding, removing, compensating them.

Shapes: D d_model, F neurons, G head groups (a KV head with its query heads), C readout columns.

The readout is the output projection of the feed-forward or of the attention, through which units
reach the residual stream. A unit owns columns of its readout and rows of the other projections;
removing these does not change any other unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.model import Model
from bench.models.network import text_config
from bench.models.structure.dense_layer import (
    FeedForward,
    Heads,
    assign_weight,
    bias_of,
    feed_forwards,
    find_heads,
    shape_of,
    state_head_groups,
    state_width,
    weight_of,
)
from bench.models.structure.model_structure import ModelStructure
from methods.moe.pruning import refuse_packed_layer

Kind = Literal["neurons", "heads"]


@dataclass(frozen=True)
class Units:
    """All units of one kind in one layer.

    `sources` are the projections whose rows belong to units, each with the unit of every row [R].
    `heads` is the attention's layout, None for neurons.
    """

    layer: int
    kind: Kind
    count: int
    owner: nn.Module
    sources: tuple[tuple[nn.Module, Tensor], ...]
    readout: nn.Module
    heads: Heads | None = None

    @property
    def width(self) -> int:
        """Readout columns per unit."""
        return shape_of(self.readout)[1] // self.count

    @property
    def weights_per_unit(self) -> int:
        """Number of weights of one unit, biases included."""
        rows = sum(
            len(unit_R) // self.count * (shape_of(source)[1] + (bias_of(source) is not None))
            for source, unit_R in self.sources
        )
        return rows + shape_of(self.readout)[0] * self.width

    def columns(self, units: Tensor) -> Tensor:
        """Return a mask over the readout's columns from a mask over units."""
        return units.repeat_interleave(self.width)


def find_units(
    structure: ModelStructure, method: str, kinds: Sequence[Kind] = ("heads", "neurons")
) -> Iterator[Units]:
    """Yield heads and neurons of every layer, in layer order, or those of one kind.

    Raises:
        UserError: a layer does not have exactly one feed-forward and one attention of a known
            layout, or its heads cannot be removed.
    """
    if not structure.layers:
        raise UserError(f"{method} needs a decoder; {structure.architecture} has no decoder layers")
    if "neurons" in kinds and structure.moe:
        raise UserError(
            f"{method} removes neurons of dense feed-forwards, but {structure.architecture} has "
            "experts: choose a method for experts such as camera_p, or units=heads"
        )
    for index, layer in enumerate(structure.layers):
        refuse_packed_layer(layer, index)
        where = f"{method}: layer {index} of {structure.architecture}"
        if "heads" in kinds:
            what = "attentions of a known layout"
            yield _heads(index, _only(find_heads(layer), f"{where} has", what, "neurons"), where)
        if "neurons" in kinds:
            what = "feed-forwards of a known form"
            yield _neurons(index, _only(feed_forwards(layer), f"{where} has", what, "heads"))


Part = TypeVar("Part")


def _only(parts: list[Part], where: str, what: str, others: Kind) -> Part:
    if len(parts) != 1:
        raise UserError(f"{where} {len(parts)} {what}, but needs exactly one: set units={others}")
    return parts[0]


def _neurons(index: int, feed_forward: FeedForward) -> Units:
    unit_F = torch.arange(feed_forward.width)
    # A fused matrix has the gate's rows first and then those of up, in the same order.
    unit_R = unit_F.repeat(2) if feed_forward.form == "fused" else unit_F
    sources = tuple((source, unit_R) for source in feed_forward.sources)
    return Units(
        index, "neurons", feed_forward.width, feed_forward.owner, sources, feed_forward.down
    )


def _heads(index: int, heads: Heads, where: str) -> Units:
    reason = heads.reason_to_stay
    if reason is not None:
        raise UserError(f"{where} {reason}, so no head can be removed: set units=neurons")
    sources = tuple(zip(heads.sources, heads.group_rows, strict=True))
    return Units(index, "heads", heads.groups, heads.owner, sources, heads.readout, heads)


@torch.no_grad()
def remove_units(units: Units, gone: Tensor, mean_C: Tensor | None = None) -> None:
    """Remove units from a layer. With `mean_C`, their mean output is added to the readout's bias.

    The bias is Σ over removed columns j of W_ij · mean_j, where `mean_C` is the mean input of the
    readout over the calibration tokens (FLAP, arXiv 2312.11983, equation 5), so that the mean
    output over these tokens does not change.
    """
    weight, bias = weight_of(units.readout), bias_of(units.readout)
    columns = units.columns(gone).to(weight.device)
    if mean_C is not None:
        lost = weight[:, columns].double() @ mean_C.to(weight.device).double()[columns]
        bias = (lost if bias is None else bias.double() + lost).to(weight)
    for source, unit_R in units.sources:
        kept = ~gone[unit_R].to(weight.device)
        before = bias_of(source)
        assign_weight(source, weight_of(source)[kept], None if before is None else before[kept])
    assign_weight(units.readout, weight[:, ~columns], bias)
    if units.heads is not None:
        state_head_groups(units.heads, int((~gone).sum()))


def describe_in_config(model: Model, units: list[Units]) -> None:
    """Update the config if one number describes all layers.

    A transformers config cannot describe layers of different widths. Such a network can be run and
    measured, but its export is refused.
    """
    config: Any = text_config(model.network)  # fields depend on the architecture
    state_width(model.network, [shape_of(u.readout)[1] for u in units if u.kind == "neurons"])
    heads = {shape_of(u.readout)[1] for u in units if u.kind == "heads"}
    # A config without KV heads (OPT) derives the width of a head from the number of heads, so it
    # cannot state fewer of them, and the export of such a network is refused.
    if len(heads) == 1 and hasattr(config, "num_key_value_heads"):
        (head_dim,) = {unit.heads.head_dim for unit in units if unit.heads is not None}
        ratio = config.num_attention_heads // config.num_key_value_heads
        config.head_dim = head_dim
        config.num_attention_heads = heads.pop() // head_dim
        config.num_key_value_heads = config.num_attention_heads // ratio
    # A flag of the config gives a bias to all projections of a module, so the others get zeros.
    for kind, flag in (("neurons", "mlp_bias"), ("heads", "attention_bias")):
        mine = [unit for unit in units if unit.kind == kind]
        if hasattr(config, flag) and any(bias_of(u.readout) is not None for u in mine):
            setattr(config, flag, True)
            for linear in (part for u in mine for part in (*(s for s, _ in u.sources), u.readout)):
                if bias_of(linear) is None:
                    weight = weight_of(linear)
                    assign_weight(linear, weight, torch.zeros(len(weight)).to(weight))
    model.invalidate_structure()
