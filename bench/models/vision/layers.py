"""Layers shared by the architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return convolution, BatchNorm and ReLU; the image keeps its size at stride 1."""
    return nn.Sequential(
        *unactivated(inputs, outputs, kernel, stride, groups), nn.ReLU(inplace=True)
    )


def unactivated(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return convolution and BatchNorm."""
    padding = kernel // 2
    # No bias: BatchNorm subtracts it again.
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Sum of a branch and a shortcut, then ReLU; without its branch, the shortcut alone."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch: nn.Module | None = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(shortcut(x) + branch(x))."""
        y: Tensor = self.shortcut(x)
        # Pruning may remove the whole branch; the block stays, so that names in the state dict do
        # not shift.
        if self.branch is not None:
            y = y + self.branch(x)
        return torch.relu(y)


class Dense(nn.Module):
    """BatchNorm, ReLU and a convolution whose few new channels are appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.convolution = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with the new channels appended."""
        return torch.cat([x, self.convolution(torch.relu(self.norm(x)))], 1)
