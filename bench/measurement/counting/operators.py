"""FLOP formulas of operators that PyTorch's FLOP counter does not know.

The counter reports 0 for attention on a CPU, for grouped expert matmuls on every device, for
transformers' fallback where those are not available, and for products with a vector. One
multiply-add is two FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch

Sizes = Sequence[int]
Formula = Callable[..., int]

# Operators that multiply matrices, recognised by name in any namespace: the first group matches
# whole words between underscores, the second any part of the name. A false alarm only withholds a
# count; a missed operator would make it too small unnoticed, so the pattern is broad.
PRODUCT = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|ger|addr|linear|einsum|bilinear|trilinear|conv\d?d?"
    r"|rnn|lstm|gru)(_|$)|matmul|attention|attn|convolution|gemm|multi_head|cdist"
)


def attention(q_BHSd: Sizes, k_BGTd: Sizes, v_BGTd: Sizes, *_: Any, **__: Any) -> int:
    """Charge q · k and weights · v in full, whatever the mask: causal attention is not halved."""
    return 2 * prod(q_BHSd[:3]) * k_BGTd[2] * (q_BHSd[3] + v_BGTd[3])


def grouped(x_SD: Sizes, weight_EDF: Sizes, *_: Any, **__: Any) -> int:
    """Charge the product of each row with the matrix of the one expert it is routed to."""
    return 2 * prod(x_SD) * weight_EDF[-1]


def matrix_vector(matrix_RC: Sizes, *_: Any, **__: Any) -> int:
    """Charge the product of a matrix and a vector, or the dot product of two vectors."""
    return 2 * prod(matrix_RC)


def added_matrix_vector(_bias: Sizes, matrix_RC: Sizes, *_: Any, **__: Any) -> int:
    """Charge a matrix-vector product plus bias; the addition is not counted."""
    return 2 * prod(matrix_RC)


def distances(x_BMD: Sizes, y_BND: Sizes, *_: Any, **__: Any) -> int:
    """Charge pairwise distances as the matmul x yᵀ that they are computed from."""
    return 2 * prod(x_BMD) * y_BND[-2]


def formulas() -> dict[Any, Formula]:
    """Return the formulas of those operators that exist in this installation."""
    aten = torch.ops.aten
    known: dict[Any, Formula] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.mv: matrix_vector,
        aten.dot: matrix_vector,
        aten.vdot: matrix_vector,
        aten.addmv: added_matrix_vector,
        aten._cdist_forward: distances,
        aten._euclidean_dist: distances,
    }
    # transformers registers its fallback as a custom operator, and not every version of torch has
    # `_grouped_mm`.
    stand_in = getattr(torch.ops, "transformers", None)
    candidates = [(aten, "_grouped_mm"), (stand_in, "grouped_mm_fallback")]
    for space, name in candidates:
        if space is not None and hasattr(space, name):
            known[getattr(space, name)] = grouped
    return known


def missed(seen: Iterable[Any], known: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of operators that ran, look like matmuls, and have no formula."""
    free = set(seen) - set(known)
    names = (str(packet) for packet in free)
    return tuple(sorted(name for name in names if is_product(name)))


def is_product(name: str) -> bool:
    """Whether the name of an operator such as `aten.addmm` says that it multiplies matrices."""
    own = name.rpartition(".")[2]
    return PRODUCT.search(own) is not None
