"""Share of visual work that remains under given settings, in closed form, as limited by a budget.

A search tries thousands of settings, so the share is computed from shapes alone. It is linear in
heads and uses the mean size of windows; `VisualFlops` counts a concrete plan exactly. Vision tower
and projector, which no strategy changes, are not included.

Symbols: L layers, D d_model, H query heads, G key-value heads, d a head's width, F the number of
feed-forward neurons that process one token, n visual tokens, s text tokens before them, t all text
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from methods.visual_engine.settings import Quota, tokens_left


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's sizes; `widths` holds F of each layer (for experts: top-k widths and shared)."""

    d_model: int
    heads: int
    groups: int
    head_dim: int
    widths: tuple[float, ...]

    @property
    def depth(self) -> int:
        """Number of layers, L."""
        return len(self.widths)


@dataclass(frozen=True)
class LayerCost:
    """Work of one layer for visual rows.

    Keys and values are computed for the `groups` key-value heads that `heads` query heads read;
    queries and outputs for `queries` heads, which is 0 in the last visual layer. `neurons` is F of
    visual rows. `quotas` are those of the pruning steps before the layer.
    """

    heads: int
    groups: int
    queries: int
    neurons: float
    quotas: tuple[Quota, ...] = ()

    def tokens(self, prompt: PromptLengths) -> int:
        """Return the number of visual tokens of a prompt that reach the layer."""
        return prompt.frames * tokens_left(self.quotas, prompt.visual // prompt.frames)

    @staticmethod
    def none() -> LayerCost:
        """Return a layer that visual rows do not reach."""
        return LayerCost(0, 0, 0, 0)


@dataclass(frozen=True)
class PromptLengths:
    """Lengths of a prompt: n visual tokens after s of t text tokens, and visual keys per query.

    `neighbours` is the mean number of visual keys per visual query before any pruning, which
    without a window is n. It is assumed to shrink in proportion to the tokens. The n tokens belong
    to `frames` frames of the same size.
    """

    visual: int
    before: int
    text: int
    neighbours: float
    frames: int = 1


def last_visual_layer(work: LayerCost) -> LayerCost:
    """Return the work of the last layer that visual rows reach: only keys and values are needed."""
    return replace(work, queries=0, neurons=0)


def visual_flops(shape: DecoderShape, work: Sequence[LayerCost], prompt: PromptLengths) -> float:
    """Return the FLOPs of visual rows in all layers: projections, attention, feed-forwards."""
    total = 0.0
    for layer in work:
        n = layer.tokens(prompt)
        seen = prompt.neighbours * n / max(prompt.visual, 1) + prompt.before
        # 2 FLOPs per multiply-add. Queries and outputs are of the query heads, keys and values of
        # the key-value heads; q·k and weights·v are n · seen multiply-adds per component; gate, up
        # and down are three matrices.
        outputs = 2 * layer.queries + 2 * layer.groups
        total += 2 * n * shape.d_model * shape.head_dim * outputs
        total += 4 * n * seen * layer.queries * shape.head_dim
        total += 6 * n * shape.d_model * layer.neurons
    return total


def visual_share(shape: DecoderShape, work: Sequence[LayerCost], prompt: PromptLengths) -> float:
    """Return visual FLOPs as a share of those of the unchanged network, linear in heads.

    The denominator is the full computation of all visual rows in all layers, without windows.
    """
    # The paper's labels (25 %, 12 %) assume that the cost of projections is quadratic in the number
    # of kept heads. It is linear, and the same settings leave 28.5 % and 16.3 % (7B).
    every = [LayerCost(shape.heads, shape.groups, shape.heads, width) for width in shape.widths]
    whole = replace(prompt, neighbours=float(prompt.visual))
    return visual_flops(shape, work, prompt) / visual_flops(shape, every, whole)


def mean_neighbours(rows: int, columns: int, radius: int) -> float:
    """Return the mean size of a window clipped at borders: 22.56 cells for 24x24 and radius 2."""

    def along(length: int) -> float:
        reach = [min(i + radius, length - 1) - max(i - radius, 0) + 1 for i in range(length)]
        return sum(reach) / length

    return along(rows) * along(columns)
