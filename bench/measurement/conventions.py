"""FLOPs as papers count them, by name: for their tables only, never for a claim of this suite.

Symbols: L layers, d d_model, m the feed-forward's width, n visual tokens of a layer, t text tokens.
None of them counts vision tower, projector or head, a discount for grouped keys and values, or the
keys of the other kind of tokens. Sources are named with each; a formula that is inferred from a
paper's figures, because its text does not give one, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bench.models.multimodal.planned import VisualLayer

Name = Literal["yopo", "pyramiddrop", "visionzip", "fastv", "vtw"]


@dataclass(frozen=True)
class Decoder:
    """A prompt in a decoder as papers see it: d, m, t and what each layer does for visual tokens.

    `heads` of a layer beyond the last with visual tokens still say what a plan keeps there.
    """

    width: int
    inner: int
    text: int
    layers: Sequence[VisualLayer]


def yopo(decoder: Decoder) -> float:
    """Return 8 n d² h² + 6 n d m r + 4 n² d h², summed over layers: visual tokens alone.

    Multiply and add count apart; h are the heads kept on average over all layers, r the neurons of
    a layer, and the last term is nothing where visual tokens see only neighbours. Dense, it gives
    the 7.63 T and 14.89 T of arXiv 2410.06169's table 2. That labels of 25 % and 12 % take h
    squared is inferred from them (and from Qwen2-VL's 30.51 of 44.25); a projection's true cost is
    linear in h.
    """
    d, m, total = decoder.width, decoder.inner, 0.0
    share = sum(layer.heads for layer in decoder.layers) / len(decoder.layers)
    for layer in decoder.layers:
        n = layer.tokens
        quadratic = 0.0 if layer.windowed else 4.0 * n**2 * d
        total += (8.0 * n * d**2 + quadratic) * share**2 + 6.0 * n * d * m * layer.neurons
    return total


def pyramid_drop(decoder: Decoder) -> float:
    """Return 4 n d² + 3 n d m + 2 n² d, summed over layers: multiply-adds of visual tokens alone.

    It gives the 3.82 T of LLaVA-1.5-7B in PyramidDrop (arXiv 2410.17247) and VisionZip.
    """
    d, m = decoder.width, decoder.inner
    tokens = (layer.tokens for layer in decoder.layers)
    return sum(4.0 * n * d**2 + 3.0 * n * d * m + 2.0 * n**2 * d for n in tokens)


def fast_v(decoder: Decoder) -> float:
    """Return 4 n d² + 2 n² d + 2 n d m, summed over layers, n being all tokens, text too.

    Multiply-adds, and two matrices of a feed-forward that has three (FastV, arXiv 2403.06764; the
    same formula in VTW). Readers of VTW get 3.23 T for LLaVA-1.5-7B with 46 text tokens from it,
    while its table prints 8.48 T, made by another program (lzhxmu/VTW, issue 7).
    """
    d, m = decoder.width, decoder.inner
    tokens = (decoder.text + layer.tokens for layer in decoder.layers)
    return sum(4.0 * n * d**2 + 2.0 * n**2 * d + 2.0 * n * d * m for n in tokens)


CONVENTIONS: dict[Name, Callable[[Decoder], float]] = {
    "yopo": yopo,
    "pyramiddrop": pyramid_drop,
    "visionzip": pyramid_drop,
    "fastv": fast_v,
    "vtw": fast_v,
}
