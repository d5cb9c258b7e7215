"""One gated expert of any width as a module, such as a block's shared experts after pruning."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from bench.models.anatomy.ragged import Activation, activation_of
from bench.models.own import OwnModule


class GatedExpert(OwnModule):
    """y = Wdown (act(Wgate x) ⊙ Wup x), with the names that published shared experts have."""

    def __init__(
        self,
        width: int,
        d_model: int,
        act_fn: Activation,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.gate_proj = _linear(torch.zeros(width, d_model, **made))
        self.up_proj = _linear(torch.zeros(width, d_model, **made))
        self.down_proj = _linear(torch.zeros(d_model, width, **made))
        self.act_fn = act_fn

    def structure(self) -> dict[str, Any]:
        """Return width and d_model."""
        return {"width": self.gate_proj.out_features, "d_model": self.gate_proj.in_features}

    @classmethod
    def empty(cls, structure: dict[str, Any], original: nn.Module) -> Self:
        """Build it with zeros, on the current default device and in the default dtype."""
        return cls(int(structure["width"]), int(structure["d_model"]), activation_of(original))

    def forward(self, x: Tensor) -> Tensor:
        """Return the expert's output, [..., D] for x [..., D]."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with this weight; nn.Linear draws one, and complains at width 0."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
