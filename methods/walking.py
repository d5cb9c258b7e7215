"""Walking calibration text through a model, one layer at a time, with its MoE blocks watched.

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.models.anatomy import MoEBlock
from bench.models.layerwise import LayerStream
from bench.models.model import Model
from bench.models.observation import Observer, observing
from bench.progress import Progress
from methods.moe_pruning import MoEPruning

Seen = TypeVar("Seen")
Shown = TypeVar("Shown", bound=Observer)
Watching = Callable[[dict[MoEBlock, Seen]], AbstractContextManager[None]]


class Walker(MoEPruning):
    """A pruning method that watches calibration text on its way through the model.

    With `sequential` a layer is changed before the next one is watched, which then sees the
    change. `batch` rows go through a layer together and at most `chunk` tokens through an expert;
    neither changes the result.
    """

    sequential: bool = True
    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    def watch(
        self, model: Model, tokens_BL: Tensor, observer: Callable[[MoEBlock], Shown], told: Progress
    ) -> Iterator[tuple[MoEBlock, Shown]]:
        """Yield every block with its observer in layer order; the consumer may change the block."""

        def watching(seen: dict[MoEBlock, Shown]) -> AbstractContextManager[None]:
            return observing(seen, self.chunk)

        return walk(model, tokens_BL, observer, watching, self.batch, self.sequential, told)


def walk(
    model: Model,
    tokens_BL: Tensor,
    start: Callable[[MoEBlock], Seen],
    watching: Watching[Seen],
    batch: int,
    sequential: bool,
    told: Progress,
) -> Iterator[tuple[MoEBlock, Seen]]:
    """Yield (block, what was seen) in layer order; a layer runs again, changed, if `sequential`.

    A block may be changed as soon as it is yielded: without `sequential` its layer has already
    passed on the outputs that it had before.
    """
    anatomy = model.anatomy
    last = anatomy.moe[-1].layer
    with LayerStream(model.network, anatomy.layers, tokens_BL, batch) as stream:
        for index in told.track(range(last + 1), "watching experts"):
            stream.stay_in(index)
            seen = {block: start(block) for block in anatomy.moe if block.layer == index}
            again = sequential and bool(seen) and index < last
            with watching(seen):
                stream.run(index, advance=not again)
            yield from seen.items()
            if again:
                stream.run(index, advance=True)


def refuse_nan(block: MoEBlock, *scores: Tensor) -> None:
    """Raise when what calibration gave for a block is NaN or infinite."""
    if not all(bool(score.isfinite().all()) for score in scores):
        raise UserError(
            f"calibration made activations of {block.name} that are NaN or infinite: try "
            "model.dtype=float32 or another calibration text"
        )
