"""FLOP conventions of papers by name, only for reproducing their tables, not for our own claims.

Symbols: L layers, d d_model, m feed-forward width, n visual tokens of a layer, t text tokens.
No convention counts vision tower, projector or head, none discounts grouped-query attention, and
none counts attention between text and visual tokens. Each function names its source; a formula
inferred from a paper's figures, because the text gives none, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.schema import FlopsConvention

if TYPE_CHECKING:
    from bench.models.macs import VisualLayer


@dataclass(frozen=True)
class ConventionInputs:
    """Inputs of a convention: d (`width`), m (`intermediate`), t (`text`), the work of each layer.

    A layer after the last one with visual tokens also has a share of heads, as if it had some.
    """

    width: int
    intermediate: int
    text: int
    layers: Sequence[VisualLayer]


def yopo(decoder: ConventionInputs) -> float:
    """Return 8 n d² h² + 6 n d m r + 4 n² d h², summed over layers, for visual tokens only.

    A multiply-add counts as two; h is the share of heads kept, averaged over all layers, and r the
    share of neurons kept in a layer. The last term is 0 in a layer where visual tokens attend only
    to neighbours. For the dense model the formula gives the 7.63 T and 14.89 T of table 2 of arXiv
    2410.06169. That h enters squared is inferred from the rows labelled 25 % and 12 % (and from
    Qwen2-VL's 30.51 of 44.25); the true cost of a projection is linear in h.
    """
    d, m, total = decoder.width, decoder.intermediate, 0.0
    # Averaged over all layers, because those without visual tokens also have a share.
    share = sum(layer.heads for layer in decoder.layers) / len(decoder.layers)
    for layer in decoder.layers:
        n = layer.tokens
        quadratic = 0.0 if layer.windowed else 4.0 * n**2 * d
        total += (8.0 * n * d**2 + quadratic) * share**2 + 6.0 * n * d * m * layer.neurons
    return total


def pyramid_drop(decoder: ConventionInputs) -> float:
    """Return 4 n d² + 3 n d m + 2 n² d, summed over layers: multiply-adds of visual tokens only.

    It gives the 3.82 T of LLaVA-1.5-7B in PyramidDrop (arXiv 2410.17247) and VisionZip.
    """
    d, m = decoder.width, decoder.intermediate
    tokens = (layer.tokens for layer in decoder.layers)
    return sum(4.0 * n * d**2 + 3.0 * n * d * m + 2.0 * n**2 * d for n in tokens)


def fast_v(decoder: ConventionInputs) -> float:
    """Return 4 n d² + 2 n² d + 2 n d m, summed over layers, where n includes text tokens.

    Counts multiply-adds, and only two of the three matrices of a gated feed-forward (FastV, arXiv
    2403.06764; VTW uses the same formula). For LLaVA-1.5-7B with 46 text tokens it gives 3.23 T,
    whereas VTW's table prints 8.48 T, computed by a different program (lzhxmu/VTW, issue 7).
    """
    d, m = decoder.width, decoder.intermediate
    tokens = (decoder.text + layer.tokens for layer in decoder.layers)
    return sum(4.0 * n * d**2 + 2.0 * n**2 * d + 2.0 * n * d * m for n in tokens)


CONVENTIONS: dict[FlopsConvention, Callable[[ConventionInputs], float]] = {
    "yopo": yopo,
    "pyramiddrop": pyramid_drop,
    "visionzip": pyramid_drop,
    "fastv": fast_v,
    "vtw": fast_v,
}
CONVENTION_UNITS: dict[FlopsConvention, str] = {
    "yopo": "FLOP",
    "pyramiddrop": "MAC",
    "visionzip": "MAC",
    "fastv": "MAC",
    "vtw": "MAC",
}
"""Unit of a convention. Only YOPO counts a multiply-add as two; the others call MACs FLOPs."""
