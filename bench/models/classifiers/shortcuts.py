"""What is left of a residual block without its branch: its shortcut, under the names it had."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bench.errors import UserError


class Shortcut(BaseModel):
    """What stands in the place of a residual block, a module of the network named `block`.

    `child` is the block's own module that computes the shortcut, empty where the input is passed
    on; `rectified` says that a ReLU follows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: str
    child: str = ""
    rectified: bool = False


class ShortcutOnly(nn.Module):
    """A residual block without its branch."""

    def __init__(self, child: str, shortcut: nn.Module | None, rectified: bool) -> None:
        super().__init__()
        self._child, self._rectified = child, rectified
        # Under the name it had, so that names in the state dict do not shift.
        if shortcut is not None:
            self.add_module(child, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the block did while all weights of its branch were zero."""
        y: Tensor = self.get_submodule(self._child)(x) if self._child else x
        return torch.relu(y) if self._rectified else y


def reduce_to_shortcut(network: nn.Module, shortcut: Shortcut) -> None:
    """Replace a residual block by its shortcut.

    Raises:
        UserError: the network has no such block.
    """
    parent, _, leaf = shortcut.block.rpartition(".")
    try:
        block = network.get_submodule(shortcut.block)
        kept = block.get_submodule(shortcut.child) if shortcut.child else None
    except AttributeError:
        raise UserError(
            f"the config reduces {shortcut.block} to a shortcut, which {type(network).__name__} "
            "does not have"
        ) from None
    left = ShortcutOnly(shortcut.child, kept, shortcut.rectified)
    setattr(network.get_submodule(parent), leaf, left.train(block.training))
