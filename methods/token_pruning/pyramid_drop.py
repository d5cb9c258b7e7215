"""PyramidDrop (Xing et al., CVPR 2025): a share of the tokens is removed after every stage."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from methods.token_pruning.pruning import TokenPruning
from methods.token_pruning.ranking import best
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.quota import Quota
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class PyramidDrop(TokenPruning):
    """Cut the decoder into equal `stages` and keep a share `ratio` (λ) of the tokens after each.

    Tokens are ranked by q · k of the last prompt token with each of them, averaged over heads, in
    the stage's last layer (the release recomputes both with the next layer's weights). Shares are
    of the frame's original tokens: λ, λ², λ³. With `average`, λ is solved for such that the mean
    over layers is this share of them.
    """

    stages: int = Field(default=4, ge=2)
    ratio: float = Field(default=0.5, gt=0, le=1)
    average: float | None = Field(default=None, gt=0, le=1)

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        cuts = [round(depth * stage / self.stages) for stage in range(1, self.stages)]
        if len({0, *cuts, depth}) != self.stages + 1:
            raise UserError(
                f"stages={self.stages}: a decoder of {depth} layers has too few for as many stages"
            )
        ratio = self.ratio if self.average is None else _ratio(self.average, cuts, depth)
        return [
            Selection(
                "pyramid_drop",
                cut,
                Quota(share=ratio**power),
                self._choose,
                attention=True,
                macs=self._macs,
            )
            for power, cut in enumerate(cuts, start=1)
        ]

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        score_IM = sight.products(sight.last_text())[:, 0]
        return Choice(best(score_IM, sight.valid, keep_I))

    def _macs(self, sizes: Sizes) -> float:
        return sizes.row_macs


def _ratio(average: float, cuts: list[int], depth: int) -> float:
    """Solve by bisection for the λ whose shares 1, λ, λ², ... have this mean over the layers."""
    if average * depth <= cuts[0]:
        raise UserError(
            f"average={average} cannot be met: the first stage keeps all tokens and is "
            f"{cuts[0] / depth:.3g} of the layers; use more stages"
        )
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, depth], strict=True)]
    low, high = 0.0, 1.0
    # The mean rises with λ, and 60 halvings exhaust float64. `high` is returned, so the mean is
    # never below `average`.
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(n * middle**power for power, n in enumerate(lengths)) / depth
        low, high = (middle, high) if mean < average else (low, middle)
    return high
