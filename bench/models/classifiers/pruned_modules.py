"""Replacements for modules that pruning changed by more than the shapes of their weights.

They are a residual block without its branch, and torch's MultiheadAttention without some of its
heads. Parameters keep their names.

Shapes: B images, S positions, D width of the inputs, H remaining heads, W width of a head.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UserError


class Shortcut(BaseModel):
    """Description of a residual block, named `block`, that is reduced to its shortcut.

    `child` is the block's own module that computes the shortcut, empty if the shortcut is the
    identity; `rectified` is true if a ReLU follows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: str = Field(min_length=1)
    child: str = Field("", pattern=r"^[^.]*$")
    rectified: bool = False


class ShortcutOnly(nn.Module):
    """A residual block without its branch."""

    def __init__(self, child: str, shortcut: nn.Module | None, rectified: bool) -> None:
        super().__init__()
        self._child, self._rectified = child, rectified
        # Under its old name, so that names in the state dict do not change.
        if shortcut is not None:
            self.add_module(child, shortcut)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Compute the block's output for a branch whose weights are all zero.

        Arguments for the branch, such as masks, are ignored.
        """
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


class PrunedAttention(nn.Module):
    """Self- or cross-attention with H heads of the original width; parameters keep their names.

    torch's own module does not support H W unequal to D.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight: nn.Parameter = whole.in_proj_weight
        self.in_proj_bias: nn.Parameter | None = whole.in_proj_bias
        self.out_proj = whole.out_proj
        self.head_dim: int = whole.embed_dim // whole.num_heads
        self.batch_first: bool = whole.batch_first
        self._dropout = whole.dropout

    @property
    def num_heads(self) -> int:
        """Number of remaining heads."""
        rows: int = self.in_proj_weight.shape[0]
        return rows // 3 // self.head_dim

    def resize(self, shape: tuple[int, ...]) -> None:
        """Give the projections of queries, keys and values new weights of this shape.

        Raises:
            UserError: the shape does not match any number of heads.
        """
        like = self.in_proj_weight
        multiple = 3 * self.head_dim
        if (
            len(shape) != 2
            or shape[1] != like.shape[1]
            or not 0 < shape[0] <= len(like)
            or shape[0] % multiple
        ):
            raise UserError(
                f"the config gives attention a projection of {list(shape)}: it takes a multiple of "
                f"{multiple} rows, at most {len(like)}, of {like.shape[1]} columns"
            )
        rows = shape[0]
        self.in_proj_weight = nn.Parameter(like.new_empty(rows, like.shape[1]))
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            self.in_proj_bias = nn.Parameter(like.new_zeros(rows))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Attend without a mask; attention weights are not returned."""
        if need_weights:
            raise ValueError("the weights of an attention without some of its heads are not kept")
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projections = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        q_BHSW, k_BHSW, v_BHSW = (self._project(*parts) for parts in projections)
        dropout = self._dropout if self.training else 0.0
        mixed_BHSW = functional.scaled_dot_product_attention(
            q_BHSW, k_BHSW, v_BHSW, dropout_p=dropout
        )
        mixed_BSD: Tensor = self.out_proj(mixed_BHSW.transpose(1, 2).flatten(2))
        return mixed_BSD if self.batch_first else mixed_BSD.transpose(0, 1), None

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_BSD = x if self.batch_first else x.transpose(0, 1)
        heads_BSHW = functional.linear(x_BSD, weight, bias).unflatten(-1, (-1, self.head_dim))
        heads_BHSW: Tensor = heads_BSHW.transpose(1, 2)
        return heads_BHSW


def prune_attention(network: nn.Module, name: str) -> PrunedAttention:
    """Replace torch's attention module by one with a variable number of heads, if necessary."""
    attention = network.get_submodule(name)
    if isinstance(attention, nn.MultiheadAttention):
        parent, _, leaf = name.rpartition(".")
        pruned = PrunedAttention(attention).train(attention.training)
        setattr(network.get_submodule(parent), leaf, pruned)
        return pruned
    assert isinstance(attention, PrunedAttention)
    return attention


ATTENTION = (nn.MultiheadAttention, PrunedAttention)
