"""Operators that PyTorch's FLOP counter does not know, and what they cost.

The counter reports 0 for attention on a CPU, for grouped expert products everywhere, and for
transformers' stand-in where the latter do not run. One multiply-add is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Sizes = Sequence[int]


def counter() -> FlopCounterMode:
    """Return a counter that sees every product of a real call, on a CPU, too."""
    return FlopCounterMode(display=False, custom_mapping=_formulas())


def attention(q_BHSd: Sizes, k_BGTd: Sizes, v_BGTd: Sizes, *_: Any, **__: Any) -> int:
    """Charge q·k and weights·v in full, whatever a mask leaves of them: never causally halved."""
    return 2 * prod(q_BHSd[:3]) * k_BGTd[2] * (q_BHSd[3] + v_BGTd[3])


def grouped(x_SD: Sizes, weight_EDF: Sizes, *_: Any, **__: Any) -> int:
    """Charge each row's product with the one matrix that it meets."""
    return 2 * prod(x_SD) * weight_EDF[-1]


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas of the operators that this installation has."""
    aten = torch.ops.aten
    known: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention
    }
    stand_in = getattr(torch.ops, "transformers", None)
    candidates = [(aten, "_grouped_mm"), (stand_in, "grouped_mm_fallback")]
    for space, name in candidates:
        if space is not None and hasattr(space, name):
            known[getattr(space, name)] = grouped
    return known
