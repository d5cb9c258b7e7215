"""How much of attention goes into pairs that a mask hides, seen where attention is asked for.

Below, in the dispatcher, a mask may have become a sum, and attention may be split into its
products; at PyTorch's own function it is still a mask. Shapes: B samples, H heads, Q queries, K
keys, d widths of q and v.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class HiddenPairs(TorchFunctionMode):
    """Adds up, while it is on, the FLOPs of pairs of query and key that masks hide.

    `calls` counts how often attention was asked for by this function, `unknown` says that a mask
    without values was among them: the causal count is then unknown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls = 0
        self.unknown = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at attention, and let everything run as it is."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> None:
        self.calls += 1
        heads, queries, keys = prod(query.shape[:-2]), query.shape[-2], key.shape[-2]
        per_pair = 2 * (query.shape[-1] + value.shape[-1])
        if is_causal:
            # Row i sees keys 0 to i: PyTorch aligns the mask at the top left.
            hidden = sum(max(keys - 1 - row, 0) for row in range(queries))
            self.flops += per_pair * heads * hidden
        elif attn_mask is not None:
            self._masked(attn_mask, heads * queries * keys, per_pair)

    def _masked(self, mask: Tensor, pairs: int, per_pair: int) -> None:
        if isinstance(mask, FakeTensor) or mask.is_meta:
            self.unknown = True
            return
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else None
        hidden = ~mask if lowest is None else mask <= lowest
        # A mask may serve several samples and heads.
        self.flops += round(per_pair * pairs * float(hidden.double().mean()))
