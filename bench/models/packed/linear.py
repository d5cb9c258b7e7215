"""A linear layer whose weights are codes, dequantized only while it computes.

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
    """y = x Wᵀ + b with W = offset + scale · code, stored in buffers `codes`, `scale`, `offset`.

    `weight` is computed from scratch whenever it is read, in the type `dtype`; writing to it has no
    effect. Buffers are not initialised: `store` or `load_state_dict` fills them.
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
        # Not `nn.Linear.__init__`, which would allocate the dense weight. Still a subclass, since
        # linear layers are recognised by isinstance.
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
            # int16 is half of an int32 order; hence the limit of 2^15 columns in `PackedShape`.
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
        """Dequantize the weights, [R, C], with columns in the order of the input."""
        axis = 0 if self.shape.axis == "rows" else 1
        parts = [self._numbers(block, self.codes[place], dtype) for block, place in self._places()]
        if not parts:
            return self.scale.new_zeros(self.shape.rows, self.shape.columns, dtype=dtype)
        weight_RC = torch.cat(parts, axis)
        # The inverse permutation: stored column c is input column order[c].
        return weight_RC[:, torch.argsort(self.order)] if self.shape.permuted else weight_RC

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Dequantized weights; a copy."""
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

    def _places(self) -> Iterator[tuple[Block, slice]]:
        """Yield every block with its slice of `codes`."""
        blocks = list(self.shape.blocks())
        sizes = [packed_size(block.area, block.bits) for block in blocks]
        for block, size, stop in zip(blocks, sizes, accumulate(sizes), strict=True):
            yield block, slice(stop - size, stop)

    def _numbers(self, block: Block, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize one block, computed in float32."""
        codes_rc = unpack(packed, block.bits, block.area).view(block.height, block.width)
        scale_rc, offset_rc = (
            grid_RG[block.rows, block.groups]
            .float()
            # The last group of a level may be narrower than `group`, hence the cut to the block's
            # width.
            .repeat_interleave(self.shape.group, dim=1)[:, : block.width]
            for grid_RG in (self.scale, self.offset)
        )
        return torch.addcmul(offset_rc, scale_rc, codes_rc.float()).to(dtype)


def packed_linears(network: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Yield all packed layers of a network with their names."""
    for name, module in network.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module
