"""Operators that PyTorch's FLOP counter does not know, and what they cost.

The counter reports 0 for attention on a CPU, for grouped expert products everywhere, for
transformers' stand-in where the latter do not run, and for products with a vector. One
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

# Names of operators that multiply matrices, whatever they belong to: whole words or parts of them.
PRODUCT = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|ger|addr|linear|einsum|bilinear|trilinear|conv\d?d?"
    r"|rnn|lstm|gru)(_|$)|matmul|attention|attn|convolution|gemm|multi_head|cdist"
)


def attention(q_BHSd: Sizes, k_BGTd: Sizes, v_BGTd: Sizes, *_: Any, **__: Any) -> int:
    """Charge q·k and weights·v in full, whatever a mask leaves of them: never causally halved."""
    return 2 * prod(q_BHSd[:3]) * k_BGTd[2] * (q_BHSd[3] + v_BGTd[3])


def grouped(x_SD: Sizes, weight_EDF: Sizes, *_: Any, **__: Any) -> int:
    """Charge each row's product with the one matrix that it meets."""
    return 2 * prod(x_SD) * weight_EDF[-1]


def matrix_vector(matrix_RC: Sizes, *_: Any, **__: Any) -> int:
    """Charge a matrix with a vector, or two vectors."""
    return 2 * prod(matrix_RC)


def added_matrix_vector(_bias: Sizes, matrix_RC: Sizes, *_: Any, **__: Any) -> int:
    """Charge the same where a vector is added to the result."""
    return 2 * prod(matrix_RC)


def distances(x_BMD: Sizes, y_BND: Sizes, *_: Any, **__: Any) -> int:
    """Charge the distances of all pairs as their products, which they are computed from."""
    return 2 * prod(x_BMD) * y_BND[-2]


def formulas() -> dict[Any, Formula]:
    """Return the formulas of the operators that this installation has."""
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
    stand_in = getattr(torch.ops, "transformers", None)
    candidates = [(aten, "_grouped_mm"), (stand_in, "grouped_mm_fallback")]
    for space, name in candidates:
        if space is not None and hasattr(space, name):
            known[getattr(space, name)] = grouped
    return known


def missed(seen: Iterable[Any], known: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of operators that multiply, by their names, and have no formula."""
    free = set(seen) - set(known)
    names = (str(packet) for packet in free)
    return tuple(sorted(name for name in names if is_product(name)))


def is_product(name: str) -> bool:
    """Whether an operator such as `aten.addmm` multiplies matrices, by its name."""
    own = name.rpartition(".")[2]
    return PRODUCT.search(own) is not None
