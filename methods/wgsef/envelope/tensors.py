"""The operators applied in place to a weight tensor whose rows are the groups.

Shapes: M groups, G elements in a group.

Weights may be fp32 or bf16. Norms are accumulated in fp32. The M group scalars are then fp64, or
fp32 if groups have so few elements that the scalars would take as much memory as the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from methods.wgsef.envelope.newton import newton
from methods.wgsef.envelope.prox import Root, Shrinkage, debiased, envelope

_SHORT = 32
_ROWS = 1 << 13


@torch.no_grad()
def envelope_(weight_MG: Tensor, k: int, lam: float, root: Root = newton) -> Shrinkage:
    """Replace the weight by prox_{lam F}(weight), all d_j = 1; see `prox.envelope`."""
    return _apply_(weight_MG, partial(envelope, k=k, lam=lam, root=root))


@torch.no_grad()
def debiased_(weight_MG: Tensor, k: int, lam: float, root: Root = newton) -> Shrinkage:
    """Replace the weight by prox_{lam h_k}(weight), all d_j = 1; see `prox.debiased`."""
    return _apply_(weight_MG, partial(debiased, k=k, lam=lam, root=root))


def _apply_(weight_MG: Tensor, operator: Callable[[Tensor], Shrinkage]) -> Shrinkage:
    shrinkage = operator(group_norms(weight_MG)[None])
    scale_groups_(weight_MG, shrinkage.scale[0])
    return shrinkage


def group_norms(weight_MG: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, [M]: fp64, or fp32 for short rows."""
    if weight_MG.shape[1] == 1:
        return weight_MG[:, 0].abs().float()
    if weight_MG.shape[1] <= _SHORT:
        return _short_norms(weight_MG)
    norm_M: Tensor = torch.linalg.vector_norm(weight_MG, dim=1, dtype=torch.float32)
    return norm_M.double()


def _short_norms(weight_MG: Tensor) -> Tensor:
    """Return the norms of rows of a few elements."""
    # torch reduces short rows slowly, one by one; a product with ones is a tuned kernel. Blocks
    # keep the squares in the cache.
    ones_G = weight_MG.new_ones(weight_MG.shape[1], dtype=torch.float32)
    parts = [torch.mv(block.float().square(), ones_G) for block in weight_MG.split(_ROWS)]
    return torch.cat(parts).sqrt_()


def scale_groups_(weight_MG: Tensor, scale_M: Tensor) -> None:
    """Multiply each row by its factor, in place."""
    weight_MG.mul_(scale_M.to(weight_MG.dtype)[:, None])
