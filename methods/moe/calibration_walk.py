"""Calibration walk: text passes through a model layer by layer while its MoE blocks are observed.

Shapes: B rows, L tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.models.expert_hooks import ExpertObserver, observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.pruning import MoEPruning

Seen = TypeVar("Seen")
Shown = TypeVar("Shown", bound=ExpertObserver)
AttachObservers = Callable[[dict[MoEBlock, Seen]], AbstractContextManager[None]]


class CalibratedPruning(MoEPruning):
    """A pruning method that observes calibration text as it passes through the model.

    With `sequential` each layer is pruned before the next one is observed, which then sees the
    change. `batch` rows pass through a layer together, and an expert sees at most `chunk` tokens at
    a time; neither changes the result.
    """

    sequential: bool = True
    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    def watch(
        self, model: Model, tokens_BL: Tensor, observer: Callable[[MoEBlock], Shown], told: Progress
    ) -> Iterator[tuple[MoEBlock, Shown]]:
        """Yield every block with its observer in layer order; the caller may modify the block."""

        def watching(seen: dict[MoEBlock, Shown]) -> AbstractContextManager[None]:
            return observe_experts(seen, self.chunk)

        return walk_blocks(model, tokens_BL, observer, watching, self.batch, self.sequential, told)


def walk_blocks(
    model: Model,
    tokens_BL: Tensor,
    start: Callable[[MoEBlock], Seen],
    watching: AttachObservers[Seen],
    batch: int,
    sequential: bool,
    told: Progress,
) -> Iterator[tuple[MoEBlock, Seen]]:
    """Yield (block, observer) in layer order.

    `start` makes the observer of a block, and `watching` attaches observers to their blocks for one
    pass. The caller may modify or replace the experts of a block as soon as it is yielded. With
    `sequential` later blocks are observed on the outputs of the modified layer, otherwise on those
    of the unmodified one.
    """
    structure = model.structure
    last = structure.moe[-1].layer
    with LayerStream(model.network, structure.layers, tokens_BL, batch) as stream:
        # Layers after the last MoE block are never run: nothing is observed there.
        for index in told.track(range(last + 1), "observing experts"):
            # Onload first: observers allocate on the device of the weights, and the weights must
            # stay there until the caller, which runs between yields, has modified them.
            stream.onload_layer(index)
            seen = {block: start(block) for block in structure.moe if block.layer == index}
            # With `sequential` a layer runs twice: once as it was, for the observers, without
            # advancing the hidden states, and once more after the caller modified it, to produce
            # the inputs of the next layer. The last MoE layer runs once, since nothing reads its
            # output. Without `sequential` the first run already advances, so a later change cannot
            # reach the next layer.
            again = sequential and bool(seen) and index < last
            with watching(seen):
                stream.run(index, advance=not again)
            # The hooks are gone here, so the caller may replace whole modules. A change made after
            # the iterator was advanced past this layer's last block is not seen by the next layer.
            yield from seen.items()
            if again:
                stream.run(index, advance=True)


def require_finite(block: MoEBlock, *scores: Tensor) -> None:
    """Raise if a calibration statistic of a block is NaN or infinite."""
    if not all(bool(score.isfinite().all()) for score in scores):
        raise UserError(
            f"calibration produced NaN or infinite activations of {block.name}: try "
            "model.dtype=float32 or a different calibration text"
        )
