"""VisualPlan: what is computed for visual tokens. Strategies add their settings to it.

Head and neuron numbers always refer to the network as it was loaded, even after its weights have
been reordered. Numbers of layers, heads and neurons start at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from bench.errors import UserError
from methods.visual_engine.selection_step import TokenPruningStep
from methods.visual_engine.settings import (
    DecodePruning,
    DroppedHeads,
    Execution,
    LayerPlan,
    RepairedProjections,
    Window,
)


@dataclass
class VisualPlan:
    """The settings of all layers of one network.

    Layers from `cut` on compute nothing for visual tokens. `dropped_heads` sets what a dropped head
    contributes to visual rows: nothing (`zero`, as in the released LLaVA code), or attention to
    text alone (`text_only`). `steps` are sorted by layer; stage s of the decoder are the layers
    after s of them. `decode` limits which cached visual tokens generated tokens read. `repairs`
    holds refitted projections by layer, which are discarded when the kept heads or neurons change.
    `revision` grows with every change, so that cached weights can be refreshed.
    """

    layers: list[LayerPlan]
    cut: int
    window: Window | None = None
    dropped_heads: DroppedHeads = "zero"
    execution: Execution | None = None
    steps: list[TokenPruningStep] = field(default_factory=list)
    decode: DecodePruning | None = None
    repairs: dict[int, RepairedProjections] = field(default_factory=dict)
    # Not compared: plans with the same settings are equal, however often they were changed.
    revision: int = field(default=0, compare=False)

    @staticmethod
    def dense(depth: int) -> VisualPlan:
        """Return the plan of a network that treats visual tokens as text."""
        return VisualPlan([LayerPlan()] * depth, cut=depth)

    def set_execution(self, execution: Execution) -> None:
        """Set how the plan is carried out, which must be the same for all strategies of a run.

        Raises:
            UserError: an earlier strategy has set a different value.
        """
        if self.execution not in (None, execution):
            raise UserError(
                f"execution={execution} cannot be combined with execution={self.execution} of an "
                "earlier method: set the same for all visual methods of a run"
            )
        self.execution = execution
        self.revision += 1

    def keep_heads(self, heads: list[tuple[int, ...]]) -> None:
        """Set the query heads of every layer."""
        self.layers = [
            LayerPlan(tuple(sorted(kept)), layer.neurons)
            for kept, layer in zip(heads, self.layers, strict=True)
        ]
        # Refitted columns compensate for the heads and neurons that were dropped before.
        self.repair({})
        self._require_readable()

    def keep_neurons(self, neurons: list[tuple[Tensor, ...]]) -> None:
        """Set the neurons of every feed-forward of every layer."""
        self.layers = [
            LayerPlan(layer.heads, tuple(kept.sort().values for kept in units))
            for units, layer in zip(neurons, self.layers, strict=True)
        ]
        self.repair({})

    def repair(self, repairs: dict[int, RepairedProjections]) -> None:
        """Set the refitted projections of some layers."""
        self.repairs = repairs
        self.revision += 1

    def set_window(self, window: Window | None) -> None:
        """Set the window of visual attention; None is causal attention to everything."""
        self.window = window
        self.revision += 1

    def cut_at(self, cut: int) -> None:
        """Remove visual tokens before layer `cut`; with `cut` = depth no layer loses them.

        Raises:
            UserError: `cut` is out of range.
        """
        if not 1 <= cut <= len(self.layers):
            raise UserError(
                f"visual tokens can leave after 1 to {len(self.layers)} layers, not {cut}"
            )
        self.cut = cut
        self.revision += 1
        self._require_readable()

    def add_step(self, step: TokenPruningStep) -> None:
        """Add a pruning step; steps after the same layer run in the order in which they were added.

        Raises:
            UserError: the layer does not exist, the step reads attention that an earlier step after
                the same layer has invalidated, it follows a step that weighs tokens, or it
                conflicts with `decode`.
        """
        if not 0 <= step.after < len(self.layers):
            raise UserError(
                f"{step.name} selects after {step.after} layers, but the decoder has "
                f"{len(self.layers)}: allowed are 0 to {len(self.layers) - 1}"
            )
        # Python's sort is stable, which preserves the order of steps after the same layer.
        self.steps = sorted([*self.steps, step], key=lambda each: each.after)
        self.revision += 1
        for first, then in pairwise(self.steps):
            # After it, tokens stand for several each, which a second choice does not consider.
            if first.weighs:
                raise UserError(
                    f"{then.name} cannot prune after {first.name}, whose tokens count for several "
                    f"each: let {first.name} be the last to prune"
                )
            # The first step removes rows, so the recorded queries and keys of the preceding layer
            # do not match the rows that the second step would score.
            if then.attention and first.after == then.after:
                raise UserError(
                    f"{then.name} reads the attention of layer {then.after - 1}, but {first.name} "
                    "already prunes there: set another `after` for one of them"
                )

        self._require_readable()

    def prune_decode(self, pruning: DecodePruning) -> None:
        """Let generated tokens read only a part of the cached visual tokens.

        Raises:
            UserError: another method has set this, or the plan does not allow a choice.
        """
        if self.decode is not None:
            raise UserError(
                f"{pruning.name} and {self.decode.name} both choose among the cached tokens: set "
                "decode_ratio=0 for one of them"
            )
        if not 1 <= pruning.layer < len(self.layers):
            raise UserError(
                f"{pruning.name} has decode_layer={pruning.layer}, but the decoder has "
                f"{len(self.layers)} layers: set 1 to {len(self.layers) - 1}, or decode_ratio=0"
            )
        self.decode = pruning
        self.revision += 1
        self._require_readable()

    def _require_readable(self) -> None:
        """Raise `UserError` unless generated tokens can choose among the cached visual tokens."""
        pruning = self.decode
        if pruning is None:
            return
        # The choice consists of indices into one layer's cache, so the caches of all later layers
        # must hold the same tokens.
        late = next((step for step in self.steps if step.after >= pruning.layer), None)
        weighing = next((step for step in self.steps if step.weighs), None)
        reason = ""
        if self.cut <= pruning.layer:
            reason = f"visual tokens leave after {self.cut}"
        elif self.layers[pruning.layer - 1].heads == ():
            reason = "no head attends to visual tokens in the last of them"
        elif late is not None:
            reason = f"{late.name} removes tokens after {late.after}"
        elif weighing is not None:
            reason = f"the tokens of {weighing.name} count for several each"
        if reason:
            raise UserError(
                f"{pruning.name} chooses among the cached tokens after decode_layer="
                f"{pruning.layer} layers, but {reason}: set another one, or decode_ratio=0"
            )

    def reaching(self, layer: int) -> list[TokenPruningStep]:
        """Return the pruning steps carried out before a layer runs."""
        return [step for step in self.steps if step.after <= layer]

    def records_qk(self, layer: int, *, generated: bool = False) -> bool:
        """Whether a choice of tokens (of cached tokens if `generated`) reads a layer's q and k."""
        if generated:
            return self.decode is not None and self.decode.layer == layer + 1
        return any(s.attention and s.after == layer + 1 < self.cut for s in self.steps)
