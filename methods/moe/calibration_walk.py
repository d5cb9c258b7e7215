"""Calibration walk: text passes through a model layer by layer while its MoE blocks are observed.

Shapes: B rows, L tokens per row, T tokens, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.models.expert_hooks import ExpertObserver, RouterWeights, observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.pruning import MoEPruning

ObserverT = TypeVar("ObserverT", bound=ExpertObserver)


class NullObserver:
    """An observer that ignores everything; subclasses override what they need."""

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Ignore the tokens of one routed expert."""

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block's output."""


@dataclass(frozen=True)
class WalkOptions:
    """Options of a calibration walk: `batch` rows and `chunk` tokens at a time.

    With `sequential` a layer that was changed runs again before the next one is measured.
    `router_weights` are those that observers get: as the model applies them, or renormalised.
    """

    batch: int
    chunk: int
    sequential: bool = False
    router_weights: RouterWeights = "applied"


class CalibratedPruning(MoEPruning):
    """A pruning method that observes calibration text as it passes through the model.

    `batch` rows pass through a layer together, and an expert sees at most `chunk` tokens at a time;
    neither changes the result.
    """

    uses_calibration: ClassVar[bool] = True

    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    def walk_options(self, *, sequential: bool = False) -> WalkOptions:
        """Return the options of a walk; by default all layers are observed unmodified."""
        return WalkOptions(self.batch, self.chunk, sequential)


class SequentialPruning(CalibratedPruning):
    """A calibrated method that prunes each layer as soon as it is observed.

    With `sequential` the next layer is then observed on the outputs of the pruned one, otherwise on
    those of the unpruned one.
    """

    sequential: bool = True

    def observe_blocks(
        self,
        model: Model,
        tokens_BL: Tensor,
        make_observer: Callable[[MoEBlock], ObserverT],
        progress: Progress,
    ) -> Iterator[tuple[MoEBlock, ObserverT]]:
        """Yield every block with its observer in layer order; the caller may modify the block."""
        options = self.walk_options(sequential=self.sequential)
        return walk_blocks(model, tokens_BL, make_observer, options, progress)


def walk_blocks(
    model: Model,
    tokens_BL: Tensor,
    make_observer: Callable[[MoEBlock], ObserverT],
    options: WalkOptions,
    progress: Progress,
) -> Iterator[tuple[MoEBlock, ObserverT]]:
    """Yield (block, observer) in layer order.

    The caller may modify or replace the experts of a block as soon as it is yielded. With
    `options.sequential` later blocks are observed on the outputs of the modified layer, otherwise
    on those of the unmodified one.
    """
    structure = model.structure
    blocks = structure.micro_expert_blocks
    last = blocks[-1].layer
    with LayerStream(model.network, structure.layers, tokens_BL, options.batch) as stream:
        # Layers after the last MoE block are never run: nothing is observed there.
        for index in progress.track(range(last + 1), "observing experts"):
            # Onload first: observers allocate on the device of the weights, and the weights must
            # stay there until the caller, which runs between yields, has modified them.
            stream.onload_layer(index)
            observers = {block: make_observer(block) for block in blocks if block.layer == index}
            # With `sequential` a layer runs twice: once as it was, for the observers, without
            # advancing the hidden states, and once more after the caller modified it, to produce
            # the inputs of the next layer. The last MoE layer runs once, since nothing reads its
            # output. Without `sequential` the first run already advances, so a later change cannot
            # reach the next layer.
            rerun = options.sequential and bool(observers) and index < last
            with observe_experts(observers, options.chunk, options.router_weights):
                stream.run(index, advance=not rerun)
            # The hooks are gone here, so the caller may replace whole modules. A change made after
            # the iterator was advanced past this layer's last block is not seen by the next layer.
            yield from observers.items()
            if rerun:
                stream.run(index, advance=True)


def require_finite(block: MoEBlock, *scores: Tensor) -> None:
    """Raise if a calibration statistic of a block is NaN or infinite."""
    if not all(bool(score.isfinite().all()) for score in scores):
        raise UserError(
            f"calibration produced NaN or infinite activations of {block.name}: try "
            "model.dtype=float32 or a different calibration text"
        )
