"""What is computed for visual tokens and what is not: the one object that strategies add to.

Head and neuron numbers are always those of the network as it was loaded, also after its weights
have been reordered. Numbers of layers, heads and neurons start at 0.
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
    """Which visual tokens of the same frame a visual token sees: at most `radius` rows and columns.

    `causal` leaves out the cells that come later in raster order.
    """

    radius: int
    causal: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer's settings; None is everything.

    `heads` are the query heads that take part in visual computation, `neurons` one index tensor
    [kept] for each gated feed-forward of the layer (`DecoderLayer.units`).
    """

    heads: tuple[int, ...] | None = None
    neurons: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Selection:
    """One point of the plan at which visual tokens leave for good; the rest go on.

    It happens when `after` layers have run, 0 being before the decoder. Every frame keeps as many
    tokens as `quota` says, or fewer, and `choose` says which; a frame that has no more than its
    quota is left as it is. `attention` asks for the queries and keys of the layer that ran last,
    `name` is for messages. `macs` says what choosing itself multiplies; None is not known.
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

    Layers from `cut` on compute nothing for visual tokens. `dropped` says what a dropped head
    gives to visual rows: nothing (`silent`, the official LLaVA code), or attention to text alone
    (`text`). `selections` are in the order in which they happen, so that stage s of the decoder is
    what runs after s of them. `repairs` are refitted projections by layer, forgotten when other
    heads or neurons are kept. `revision` grows with every change, so that whatever was prepared
    can be renewed.
    """

    layers: list[LayerPlan]
    cut: int
    window: Window | None = None
    dropped: Dropped = "silent"
    form: Form | None = None
    selections: list[Selection] = field(default_factory=list)
    repairs: dict[int, Repair] = field(default_factory=dict)
    revision: int = field(default=0, compare=False)

    @staticmethod
    def dense(depth: int) -> VisualPlan:
        """Return the plan of a network whose visual tokens are treated as text."""
        return VisualPlan([LayerPlan()] * depth, cut=depth)

    def agree(self, form: Form) -> None:
        """Settle how the plan is carried out; all strategies of a run must want the same."""
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
        """Let visual tokens leave before layer `cut`; every layer has them at `cut` = depth."""
        if not 1 <= cut <= len(self.layers):
            raise UserError(
                f"visual tokens can leave after 1 to {len(self.layers)} layers, not {cut}"
            )
        self.cut = cut
        self.revision += 1

    def select(self, selection: Selection) -> None:
        """Add a selection; those after the same layer happen in the order in which they came."""
        if not 0 <= selection.after < len(self.layers):
            raise UserError(
                f"{selection.name} selects after {selection.after} layers, but the decoder has "
                f"{len(self.layers)}: 0 to {len(self.layers) - 1} are possible"
            )
        self.selections = sorted([*self.selections, selection], key=lambda each: each.after)
        self.revision += 1
        for first, then in pairwise(self.selections):
            if then.attention and first.after == then.after:
                raise UserError(
                    f"{then.name} reads what layer {then.after - 1} attended to, but {first.name} "
                    "has already chosen there: let one of them select after another layer"
                )

    def reaching(self, layer: int) -> list[Selection]:
        """Return the selections that happen before a layer runs."""
        return [selection for selection in self.selections if selection.after <= layer]

    def watches(self, layer: int) -> bool:
        """Whether a selection reads the queries and keys of a layer."""
        return any(s.attention and s.after == layer + 1 < self.cut for s in self.selections)
