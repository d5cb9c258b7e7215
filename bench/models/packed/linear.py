"""A linear layer whose weights are codes; they become numbers only while it computes.

Shapes: R rows (output), C columns (input), G groups of columns; r, c, g those of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.packed.codes import pack, packed_size, unpack
from bench.models.packed.shape import Block, PackedShape


class PackedLinear(nn.Linear):
    """y = x Wᵀ + b with W = offset + scale · code, kept in buffers `codes`, `scale`, `offset`.

    `weight` is computed anew whenever it is read, in the type `dtype`; writing to it changes
    nothing. Buffers are not initialised: `store` or `load_state_dict` fills them.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    order: Tensor

    def __init__(
        self,
        shape: PackedShape,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = shape.columns, shape.rows
        self.shape, self.dtype = shape, dtype
        codes = torch.empty(shape.code_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        for name in ("scale", "offset"):
            grid_RG = torch.empty(
                shape.rows, len(shape.groups()), dtype=torch.float16, device=device
            )
            self.register_buffer(name, grid_RG)
        if shape.permuted:
            order_C = torch.empty(shape.columns, dtype=torch.int16, device=device)
            self.register_buffer("order", order_C)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @torch.no_grad()
    def store(
        self, codes_RC: Tensor, scale_RG: Tensor, offset_RG: Tensor, order_C: Tensor | None = None
    ) -> None:
        """Fill the buffers; column c of the codes is input `order_C[c]`, or c without an order."""
        for block, place in self._places():
            codes = codes_RC[block.rows, block.columns].flatten()
            self.codes[place] = pack(codes, block.bits)
        self.scale.copy_(scale_RG)
        self.offset.copy_(offset_RG)
        if order_C is not None:
            self.order.copy_(order_C)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as numbers, [R, C], the columns in the order of the input."""
        axis = 0 if self.shape.axis == "rows" else 1
        parts = [self._numbers(block, self.codes[place], dtype) for block, place in self._places()]
        if not parts:
            return self.scale.new_zeros(self.shape.rows, self.shape.columns, dtype=dtype)
        weight_RC = torch.cat(parts, axis)
        return weight_RC[:, torch.argsort(self.order)] if self.shape.permuted else weight_RC

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as numbers; a copy."""
        return self.dense(self.dtype)

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b in the input's type."""
        return functional.linear(input, self.dense(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """Say the shape and the bits."""
        levels = ", ".join(f"{level.size} at {level.bits} bits" for level in self.shape.levels)
        return f"{self.in_features} -> {self.out_features}, {self.shape.axis}: {levels}"

    def _places(self) -> Iterator[tuple[Block, slice]]:
        """Yield every block with its place in `codes`."""
        blocks = list(self.shape.blocks())
        sizes = [packed_size(block.area, block.bits) for block in blocks]
        for block, size, stop in zip(blocks, sizes, accumulate(sizes), strict=True):
            yield block, slice(stop - size, stop)

    def _numbers(self, block: Block, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return one block as numbers, computed in float32."""
        codes_rc = unpack(packed, block.bits, block.area).view(block.height, block.width)
        scale_rc, offset_rc = (
            grid_RG[block.rows, block.groups]
            .float()
            .repeat_interleave(self.shape.group, dim=1)[:, : block.width]
            for grid_RG in (self.scale, self.offset)
        )
        return torch.addcmul(offset_rc, scale_rc, codes_rc.float()).to(dtype)


def packed_linears(network: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Yield all packed layers of a network with their names."""
    for name, module in network.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module
