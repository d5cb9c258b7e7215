"""One gated expert of any width as a module, such as pruned shared experts."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from bench.models.anatomy.ragged import Activation, activation_of
from bench.models.own import OwnModule


class GatedExpert(OwnModule):
    """y = Wdown (act(Wgate x) ⊙ Wup x), with the parameter names of published shared experts."""

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

    # The activation is no JSON value: `from_spec` takes it from the module that is replaced.
    def structure(self) -> dict[str, Any]:
        """Return width and d_model."""
        return {"width": self.gate_proj.out_features, "d_model": self.gate_proj.in_features}

    @classmethod
    def empty(cls, structure: dict[str, Any], original: nn.Module) -> Self:
        """Build the expert with zeros, on the current default device and in the default dtype."""
        return cls(int(structure["width"]), int(structure["d_model"]), activation_of(original))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the expert's output, [..., D] for x [..., D]."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with this weight, which may have width 0."""
    # `nn.Linear(width, ...)` would initialise a weight that is thrown away, and warns that
    # initialising a tensor of width 0 does nothing. The 1x1 layer on meta costs neither.
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
