"""FLOPs that attention spends on masked (query, key) pairs, observed at PyTorch's attention API.

Further down, in the dispatcher, the mask may already be an additive bias and attention may be split
into its matmuls; at `scaled_dot_product_attention` it is still a mask. Shapes: B samples, H heads,
Q queries, K keys, d widths of q and v.
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
    """Mode that sums the FLOPs of masked (query, key) pairs while it is active.

    `calls` is the number of attention calls. `unknown` is set if the values of a mask were not
    available; the causal count is then unknown.
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
        """Record attention calls; run every function unchanged."""
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
        # q · k over the width of q, weight · v over the width of v, two FLOPs per multiply-add.
        per_pair = 2 * (query.shape[-1] + value.shape[-1])
        if is_causal:
            # Row i attends to keys 0 to i: PyTorch aligns the causal mask at the top left.
            hidden = sum(max(keys - 1 - row, 0) for row in range(queries))
            self.flops += per_pair * heads * hidden
        elif attn_mask is not None:
            self._masked(attn_mask, heads * queries * keys, per_pair)

    def _masked(self, mask: Tensor, pairs: int, per_pair: int) -> None:
        if isinstance(mask, FakeTensor) or mask.is_meta:
            self.unknown = True
            return
        # A float mask is added to the scores: transformers writes the dtype's minimum (or -inf) for
        # a masked pair. A bool mask is True where a query may attend.
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else None
        hidden = ~mask if lowest is None else mask <= lowest
        # A mask is broadcast over samples and heads, so take its mean instead of its sum.
        self.flops += round(per_pair * pairs * float(hidden.double().mean()))
