"""Linear layers and experts with packed weights, and how to rebuild them from JSON.

Weights are dequantized only while a layer computes. A state dict contains the buffers, but not
their meaning, which `describe_packed` states for every packed layer. `install_packed` puts empty
modules of these shapes into a network of the original architecture, and `load_state_dict` fills
their buffers.

Shapes: R rows (output), C columns (input), G groups of columns; r, c, g those of one block; T
tokens, K experts per token, S tokens of one expert, F an expert's width, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UserError, error_sentence
from bench.models.bitpacking.packed_shape import (
    BitBlock,
    GridKind,
    Level,
    PackedShape,
    consecutive_slices,
    pack_codes,
    packed_size,
    unpack_codes,
)
from bench.models.structure.expert_view import Activation, slots_per_expert

# Further values that a grid of each kind stores besides its scale.
GRID_BUFFERS: dict[GridKind, dict[str, torch.dtype]] = {
    "offset": {"offset": torch.float16},
    "zero_point": {"zero_point": torch.uint8},
    "symmetric": {},
}


class PackedLinear(nn.Linear):
    """y = x Wᵀ + b with W = offset + scale · code, stored in buffers `codes`, `scale` and `offset`.

    If a code stands for zero (`PackedShape.grid`), the offset is -scale · zero: `zero_point` grids
    store this code instead of the offset, and `symmetric` grids need neither.

    `weight` is dequantized on every access, with type `dtype`; writing to it has no effect. Buffers
    are not initialised: `store` or `load_state_dict` fills them.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    zero_point: Tensor
    order: Tensor

    def __init__(
        self,
        shape: PackedShape,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        # `nn.Linear.__init__` would allocate the dense weight. The base class is still needed,
        # because linear layers are recognised by isinstance.
        nn.Module.__init__(self)
        self.in_features, self.out_features = shape.columns, shape.rows
        if shape.transposed:
            self.in_features, self.out_features = shape.rows, shape.columns
        self.shape, self.dtype = shape, dtype
        codes = torch.empty(shape.code_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        stored = {"scale": torch.float16} | GRID_BUFFERS[shape.grid]
        for name, kind in stored.items():
            grid_RG = torch.empty(shape.rows, len(shape.groups()), dtype=kind, device=device)
            self.register_buffer(name, grid_RG)
        if shape.permuted:
            # int16 takes half the memory of int32, hence the limit of 2^15 columns in
            # `PackedShape`.
            order_C = torch.empty(shape.columns, dtype=torch.int16, device=device)
            self.register_buffer("order", order_C)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @torch.no_grad()
    def store(
        self, codes_RC: Tensor, scale_RG: Tensor, offset_RG: Tensor, order_C: Tensor | None = None
    ) -> None:
        """Fill the buffers; column c of the codes is input `order_C[c]`, or c without an order.

        Offsets are those of W = offset + scale · code, even if the grid does not store them.
        """
        for block, place in self._block_slices():
            codes = codes_RC[block.rows, block.columns].flatten()
            self.codes[place] = pack_codes(codes, block.bits)
        self.scale.copy_(scale_RG)
        if self.shape.grid == "offset":
            self.offset.copy_(offset_RG)
        elif self.shape.grid == "zero_point":
            # Exact, because the offset is a product of the scale and an integer, in float32. With a
            # scale of 0 the offset is 0.
            step_RG = torch.where(scale_RG > 0, scale_RG, 1).float()
            self.zero_point.copy_((-offset_RG.float() / step_RG).round())
        if order_C is not None:
            self.order.copy_(order_C)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weights [out, in], with columns in the order of the input."""
        stored_RC = self._stored(dtype)
        return stored_RC.T if self.shape.transposed else stored_RC

    def _stored(self, dtype: torch.dtype) -> Tensor:
        if self.codes.is_meta:
            # Counting FLOPs needs only shapes, but unpacking would dispatch 80 operators.
            return self.codes.new_empty(self.shape.rows, self.shape.columns, dtype=dtype)
        axis = 0 if self.shape.axis == "rows" else 1
        parts = [
            self._dequantized(block, self.codes[place], dtype)
            for block, place in self._block_slices()
        ]
        if not parts:
            return self.scale.new_zeros(self.shape.rows, self.shape.columns, dtype=dtype)
        weight_RC = torch.cat(parts, axis)
        # The inverse permutation: stored column c is input column order[c].
        return weight_RC[:, torch.argsort(self.order)] if self.shape.permuted else weight_RC

    def code_matrix(self) -> Tensor:
        """Return the codes as stored, uint8 [R, C]."""
        codes_RC = self.codes.new_empty(self.shape.rows, self.shape.columns)
        for block, place in self._block_slices():
            codes = unpack_codes(self.codes[place], block.bits, block.area)
            codes_RC[block.rows, block.columns] = codes.view(block.height, block.width)
        return codes_RC

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Dequantized weights, as a copy."""
        return self.dense(self.dtype)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Compute x Wᵀ + b in the input's type."""
        return functional.linear(input, self.dense(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describe shape and bits."""
        levels = ", ".join(f"{level.size} at {level.bits} bits" for level in self.shape.levels)
        return f"{self.in_features} -> {self.out_features}, {self.shape.axis}: {levels}"

    def _block_slices(self) -> Iterator[tuple[BitBlock, slice]]:
        """Yield every block with its slice of `codes`."""
        blocks = list(self.shape.blocks())
        sizes = [packed_size(block.area, block.bits) for block in blocks]
        yield from zip(blocks, consecutive_slices(sizes), strict=True)

    def _dequantized(self, block: BitBlock, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return one block dequantized in float32."""
        codes_rc = unpack_codes(packed, block.bits, block.area).view(block.height, block.width)
        scale_rg = self.scale[block.rows, block.groups].float()
        scale_rc, offset_rc = (
            # The last group of a level may be narrower than `group`, hence the cut to the block's
            # width.
            grid_rg.repeat_interleave(self.shape.group, dim=1)[:, : block.width]
            for grid_rg in (scale_rg, self._offset(block, scale_rg))
        )
        return torch.addcmul(offset_rc, scale_rc, codes_rc.float()).to(dtype)

    def _offset(self, block: BitBlock, scale_rg: Tensor) -> Tensor:
        """Return the offsets of one block in float32, in which -scale · zero is exact."""
        if self.shape.grid == "offset":
            return self.offset[block.rows, block.groups].float()
        # With two codes none stands for 0: they are half a step below and above it.
        zero_rg = torch.full_like(scale_rg, 2 ** (block.bits - 1) if block.bits > 1 else 0.5)
        if self.shape.grid == "zero_point":
            zero_rg = self.zero_point[block.rows, block.groups].float()
        return -scale_rg * zero_rg


def packed_linears(network: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Yield all packed layers of a network with their names."""
    for name, module in network.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters, with tied ones once and packed ones before packing."""
    packed = sum(linear.numel for _, linear in packed_linears(network))
    return sum(weight.numel() for weight in network.parameters()) + packed


class PackedExpert(nn.Module):
    """One gated expert y = Wdown (act(Wgate x) ⊙ Wup x), whose width may be zero."""

    def __init__(
        self,
        gate: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        act: Activation,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act

    def forward(self, x_SD: Tensor) -> Tensor:
        """Compute the expert's output [S, D], dequantizing one matrix at a time."""
        hidden_SF = self.act_fn(self.gate_proj(x_SD)) * self.up_proj(x_SD)
        return cast(Tensor, self.down_proj(hidden_SF))


class PackedExperts(nn.ModuleList):
    """The experts of one MoE block, called like transformers' fused experts."""

    def __init__(self, experts: Iterable[PackedExpert]) -> None:
        super().__init__(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_e A_e · expert_e(x), [T, D], for x [T, D] and the router's choice [T, K]."""
        x_TD, top_k = hidden_states, top_k_index.shape[1]
        # Summed in float32, so that half precision does not make the result depend on the order.
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, slots_S in enumerate(slots_per_expert(top_k_index, len(self))):
            if not len(slots_S):
                continue
            token_S = slots_S // top_k
            weight_S = top_k_weights.flatten()[slots_S]
            y_SD = self[expert](x_TD[token_S]) * weight_S[:, None]
            y_TD.index_add_(0, token_S, y_SD.float())
        return y_TD.to(x_TD.dtype)


EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# The fields of `PackedShape`, and the dtype to which the weights are dequantized.
LinearDescription = dict[str, Any]


class PackedDescription(TypedDict):
    """Packed modules of a network: experts per block, and the shape of every linear layer."""

    experts: dict[str, int]
    linears: dict[str, LinearDescription]


def describe_packed(network: nn.Module) -> PackedDescription:
    """Return the shapes of all packed layers by name, and the names of packed experts."""
    experts = {
        name: len(module)
        for name, module in network.named_modules()
        if isinstance(module, PackedExperts)
    }
    return {
        "experts": experts,
        "linears": {name: _describe_linear(linear) for name, linear in packed_linears(network)},
    }


def install_packed(
    network: nn.Module, description: PackedDescription, device: torch.device | None = None
) -> None:
    """Replace the modules named in the description by empty packed ones on `device`.

    Raises:
        UserError: the description does not match the network.
    """
    try:
        linears = {
            name: _empty_linear(entry, device) for name, entry in description["linears"].items()
        }
        # Experts first, because their layers are submodules of a new module.
        for name, count in description["experts"].items():
            _install_packed_experts(network, name, int(count), linears)
        for name, linear in linears.items():
            # Biases are not packed, so the original parameter is reused and loaded as usual. It is
            # shortened if micro-experts were removed.
            bias = cast(nn.Linear, network.get_submodule(name)).bias
            linear.register_parameter("bias", _first_rows(bias, linear))
            network.set_submodule(name, linear)
    except Exception as error:  # A constructor may raise anything for untrusted values.
        reason = error_sentence(error)
        raise UserError(
            f"slimbench.json: the packed weights do not match the network: {reason}"
        ) from None


def _first_rows(bias: nn.Parameter | None, linear: PackedLinear) -> nn.Parameter | None:
    if bias is None or len(bias) == linear.out_features:
        return bias
    return nn.Parameter(bias.detach()[: linear.out_features].clone(), requires_grad=False)


def _install_packed_experts(
    network: nn.Module, name: str, count: int, linears: dict[str, PackedLinear]
) -> None:
    """Replace a block's experts by packed ones, and remove their layers from `linears`."""
    before = network.get_submodule(name)
    # Fused modules have the activation themselves, in a list each expert has it.
    act = getattr(before, "act_fn", None) or before.get_submodule("0").act_fn
    experts = []
    for number in range(count):
        gate, up, down = (linears.pop(f"{name}.{number}.{part}") for part in EXPERT_PROJECTIONS)
        experts.append(PackedExpert(gate, up, down, cast(Activation, act)))
    network.set_submodule(name, PackedExperts(experts))


def _describe_linear(linear: PackedLinear) -> LinearDescription:
    return {**asdict(linear.shape), "dtype": str(linear.dtype).removeprefix("torch.")}


def _empty_linear(entry: LinearDescription, device: torch.device | None) -> PackedLinear:
    fields = dict(entry)
    dtype = getattr(torch, fields.pop("dtype"))
    levels = tuple(Level(*level) for level in fields.pop("levels"))
    return PackedLinear(PackedShape(levels=levels, **fields), dtype, device=device)
