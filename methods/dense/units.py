"""FFN neurons and attention heads of dense decoder layers: found, removed, compensated.

Shapes: D d_model, F neurons, G head groups (a KV head with its query heads), C readout columns.

The readout is the projection through which units reach the residual stream: `down_proj` for
neurons, `o_proj` for heads. A unit owns columns of its readout, so removing it and its rows
elsewhere leaves all other units as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.model import Model
from bench.models.network import text_config
from bench.models.structure.model_structure import ModelStructure
from methods.dense.linear_layers import refuse_packed

Kind = Literal["neurons", "heads"]
_FFN = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Units:
    """All units of one kind in one layer.

    `sources` are the projections whose rows belong to units, each with its rows per unit.
    """

    layer: int
    kind: Kind
    count: int
    owner: nn.Module
    sources: tuple[tuple[nn.Linear, int], ...]
    readout: nn.Linear

    @property
    def width(self) -> int:
        """Readout columns per unit."""
        return self.readout.in_features // self.count

    @property
    def weights_per_unit(self) -> int:
        """Weights that leave with one unit, biases aside."""
        rows = sum(source.in_features * rows for source, rows in self.sources)
        return rows + self.readout.out_features * self.width

    def columns(self, units: Tensor) -> Tensor:
        """Return a mask over the readout's columns from a mask over units."""
        return units.repeat_interleave(self.width)


def find_units(structure: ModelStructure, method: str) -> Iterator[Units]:
    """Yield heads and neurons of every layer, in layer order.

    Raises:
        UserError: a layer has not exactly one gated FFN and one attention of separate projections.
    """
    if not structure.layers:
        raise UserError(f"{method} needs a decoder; {structure.architecture} has no decoder layers")
    for index, layer in enumerate(structure.layers):
        refuse_packed(layer, index)
        yield _heads(index, _only(layer, _ATTENTION, f"{method}: layer {index} of", structure))
        yield _neurons(index, _only(layer, _FFN, f"{method}: layer {index} of", structure))


def _only(
    layer: nn.Module, parts: tuple[str, ...], where: str, structure: ModelStructure
) -> nn.Module:
    found = [
        module
        for module in layer.modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts)
    ]
    if len(found) != 1:
        raise UserError(
            f"{where} {structure.architecture} has {len(found)} modules with "
            f"{', '.join(parts)}; exactly one is supported"
        )
    return found[0]


def _neurons(index: int, ffn: Any) -> Units:
    sources = ((ffn.gate_proj, 1), (ffn.up_proj, 1))
    return Units(index, "neurons", ffn.down_proj.in_features, ffn, sources, ffn.down_proj)


def _heads(index: int, attention: Any) -> Units:
    width = int(attention.head_dim)
    groups = attention.k_proj.out_features // width
    # Query heads of one KV head are consecutive: the order in which transformers' `repeat_kv`
    # pairs them.
    queries = attention.q_proj.out_features // groups
    sources = (
        (attention.q_proj, queries),
        (attention.k_proj, width),
        (attention.v_proj, width),
    )
    return Units(index, "heads", groups, attention, sources, attention.o_proj)


@torch.no_grad()
def remove_units(units: Units, gone: Tensor, mean_C: Tensor | None = None) -> None:
    """Cut units out of a layer. With `mean_C`, their mean output stays as a bias of the readout.

    The bias is Σ over removed columns j of W_ij · mean_j, with `mean_C` the mean input of the
    readout over the calibration tokens (FLAP, arXiv 2312.11983, equation 5): the mean of the
    layer's output over these tokens does not change.
    """
    columns = units.columns(gone).to(units.readout.weight.device)
    if mean_C is not None:
        weight = units.readout.weight
        lost = weight[:, columns].double() @ mean_C.to(weight.device).double()[columns]
        before = bias_of(units.readout)
        bias = lost if before is None else before.double() + lost
        units.readout.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    for source, rows in units.sources:
        kept = (~gone).repeat_interleave(rows).to(source.weight.device)
        source.weight = nn.Parameter(source.weight[kept], requires_grad=False)
        bias_F = bias_of(source)
        if bias_F is not None:
            source.bias = nn.Parameter(bias_F[kept], requires_grad=False)
        source.out_features = len(source.weight)
    readout = units.readout
    readout.weight = nn.Parameter(readout.weight[:, ~columns], requires_grad=False)
    readout.in_features = readout.weight.shape[1]


def bias_of(linear: nn.Linear) -> Tensor | None:
    """Return the bias, which PyTorch's type declares to exist always."""
    return linear.bias


def describe_in_config(model: Model, units: list[Units]) -> None:
    """Make the config agree with the layers where one number can describe all of them.

    Layers of different widths have no place in a transformers config. Such a network runs and is
    measured like any other; only its export is refused.
    """
    config: Any = text_config(model.network)  # fields depend on the architecture
    counts = {
        kind: {u.readout.in_features for u in units if u.kind == kind}
        for kind in ("neurons", "heads")
    }
    if len(counts["neurons"]) == 1:
        config.intermediate_size = counts["neurons"].pop()
    if len(counts["heads"]) == 1:
        head_dim = int(getattr(units[0].owner, "head_dim"))  # noqa: B009  # modules declare none
        ratio = config.num_attention_heads // config.num_key_value_heads
        config.head_dim = head_dim
        config.num_attention_heads = counts["heads"].pop() // head_dim
        config.num_key_value_heads = config.num_attention_heads // ratio
    biased = any(bias_of(u.readout) is not None for u in units)
    if biased and hasattr(config, "mlp_bias") and hasattr(config, "attention_bias"):
        # One flag of the config gives a bias to all projections of a module, so the others get
        # zeros.
        config.mlp_bias = config.attention_bias = True
        for unit in units:
            for linear in (*(source for source, _ in unit.sources), unit.readout):
                if bias_of(linear) is None:
                    zeros = torch.zeros(linear.out_features).to(linear.weight)
                    linear.bias = nn.Parameter(zeros, requires_grad=False)
    model.invalidate_structure()
