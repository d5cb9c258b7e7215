"""Ranks of the differences within a budget of weights."""

from __future__ import annotations


def ranks(experts: int, d_model: int, width: int, kept: int) -> list[int] | None:
    """Return the rank of every expert's gate, up and down difference, in this order.

    `kept` weights pay for one base expert, 3 · d_model · width, and for the factors of 3 ·
    `experts` differences at d_model + width per rank. All ranks are equal, except that the first
    ones are one higher to use the remainder, so fewer than d_model + width weights of the budget
    stay unused. None if `kept` does not cover the base.
    """
    for_factors = kept - 3 * d_model * width
    if for_factors < 0:
        return None
    same, more = divmod(for_factors // (d_model + width), 3 * experts)
    return [same + (place < more) for place in range(3 * experts)]
