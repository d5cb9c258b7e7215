"""VisualPlan: what is computed for visual tokens; the one object that strategies add to.

Head and neuron numbers always refer to the network as it was loaded, even after its weights have
been reordered. Numbers of layers, heads and neurons start at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from bench.errors import UserError
from methods.visual_tokens.quota import Quota

if TYPE_CHECKING:
    from methods.visual_tokens.sight import Choice, Sight
    from methods.visual_tokens.sizes import Sizes
    from methods.visual_tokens.weights import Repair

Form = Literal["skip", "official"]
Dropped = Literal["silent", "text"]


@dataclass(frozen=True)
class Window:
    """Square of visual tokens in one frame that a visual token attends to.

    It extends `radius` rows and columns to each side; `causal` excludes cells that come later in
    raster order.
    """

    radius: int
    causal: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer's settings; None means everything.

    `heads` are the query heads used for visual tokens, `neurons` one index tensor [kept] for each
    gated feed-forward of the layer (`DecoderLayer.units`).
    """

    heads: tuple[int, ...] | None = None
    neurons: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Selection:
    """One point of the plan at which visual tokens are removed for good.

    It is carried out when `after` layers have run, 0 being before the decoder. Every frame keeps
    `quota` tokens or fewer, chosen by `choose`; a frame that has no more than its quota is left
    unchanged. `attention` requests the queries and keys of the preceding layer; `name` is for
    messages. `macs` counts the multiply-adds of the choice itself; None means unknown.
    """

    name: str
    after: int
    quota: Quota
    choose: Callable[[Sight, Tensor], Choice]
    attention: bool = False
    macs: Callable[[Sizes], float] | None = None


@dataclass
class VisualPlan:
    """The settings of all layers of one network.

    Layers from `cut` on compute nothing for visual tokens. `dropped` sets what a dropped head
    contributes to visual rows: nothing (`silent`, as in the official LLaVA code), or attention to
    text alone (`text`). `selections` are sorted by when they happen, so stage s of the decoder is
    what runs after s of them. `repairs` holds refitted projections by layer; they are discarded
    when other heads or neurons are kept. `revision` grows with every change, so that cached weights
    can be refreshed.
    """

    layers: list[LayerPlan]
    cut: int
    window: Window | None = None
    dropped: Dropped = "silent"
    form: Form | None = None
    selections: list[Selection] = field(default_factory=list)
    repairs: dict[int, Repair] = field(default_factory=dict)
    # Not compared: two plans with the same settings are equal, however often they were changed.
    revision: int = field(default=0, compare=False)

    @staticmethod
    def dense(depth: int) -> VisualPlan:
        """Return the plan of a network that treats visual tokens as text."""
        return VisualPlan([LayerPlan()] * depth, cut=depth)

    def agree(self, form: Form) -> None:
        """Set how the plan is carried out; all strategies of a run must agree.

        Raises:
            UserError: an earlier strategy chose differently.
        """
        if self.form not in (None, form):
            raise UserError(f"form={form} cannot be combined with form={self.form}: choose one")
        self.form = form
        self.revision += 1

    def keep_heads(self, heads: list[tuple[int, ...]]) -> None:
        """Set the query heads of every layer."""
        self.layers = [
            LayerPlan(tuple(sorted(kept)), layer.neurons)
            for kept, layer in zip(heads, self.layers, strict=True)
        ]
        # Refitted columns compensate for exactly the heads and neurons that were dropped then.
        self.repair({})

    def keep_neurons(self, neurons: list[tuple[Tensor, ...]]) -> None:
        """Set the neurons of every feed-forward of every layer."""
        self.layers = [
            LayerPlan(layer.heads, tuple(kept.sort().values for kept in units))
            for units, layer in zip(neurons, self.layers, strict=True)
        ]
        self.repair({})

    def repair(self, repairs: dict[int, Repair]) -> None:
        """Set the refitted projections of some layers."""
        self.repairs = repairs
        self.revision += 1

    def see(self, window: Window | None) -> None:
        """Set the window of visual attention; None is causal attention to everything."""
        self.window = window
        self.revision += 1

    def cut_at(self, cut: int) -> None:
        """Remove visual tokens before layer `cut`; with `cut` = depth every layer has them.

        Raises:
            UserError: `cut` is out of range.
        """
        if not 1 <= cut <= len(self.layers):
            raise UserError(
                f"visual tokens can leave after 1 to {len(self.layers)} layers, not {cut}"
            )
        self.cut = cut
        self.revision += 1

    def select(self, selection: Selection) -> None:
        """Add a pruning step; steps after the same layer run in the order in which they were added.

        Raises:
            UserError: the layer does not exist, or the step reads attention that an earlier step
                after the same layer has invalidated.
        """
        if not 0 <= selection.after < len(self.layers):
            raise UserError(
                f"{selection.name} selects after {selection.after} layers, but the decoder has "
                f"{len(self.layers)}: allowed are 0 to {len(self.layers) - 1}"
            )
        # Python's sort is stable, which preserves the order of steps after the same layer.
        self.selections = sorted([*self.selections, selection], key=lambda each: each.after)
        self.revision += 1
        for first, then in pairwise(self.selections):
            # The first step removes rows, so the queries and keys of the preceding layer no longer
            # match the rows that the second one would score.
            if then.attention and first.after == then.after:
                raise UserError(
                    f"{then.name} reads the attention of layer {then.after - 1}, but {first.name} "
                    "already prunes there: set another `after` for one of them"
                )

    def reaching(self, layer: int) -> list[Selection]:
        """Return the pruning steps carried out before a layer runs."""
        return [selection for selection in self.selections if selection.after <= layer]

    def watches(self, layer: int) -> bool:
        """Whether a pruning step reads the queries and keys of a layer."""
        return any(s.attention and s.after == layer + 1 < self.cut for s in self.selections)
