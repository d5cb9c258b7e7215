"""Quantizing a network layer by layer, each on what the quantized layers before it produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.anatomy import MoEBlock
from bench.models.layerwise import LayerStream
from bench.models.model import Model
from bench.models.observation import Observer, observing
from bench.models.packed import Level, PackedExperts, PackedShape
from bench.models.residence import resident
from bench.progress import Progress
from methods.quantization.backend import Backend
from methods.quantization.hessian import Hessian
from methods.quantization.linears import Kind, Place, linears, watching
from methods.quantization.observers import BlockHessians, Planner, Several
from methods.quantization.tally import Tally, spread

UNTOUCHED = 16


@dataclass
class Quantizer:
    """How to quantize; `tallies` counts what was done, by kind of weight.

    `bits` are those of everything but the routed experts, whose plans `planner` makes; 16 leaves
    weights as they are. `batch` rows go through a layer together, at most `chunk` tokens are
    shown at once.
    """

    backend: Backend
    planner: Callable[[MoEBlock], Planner]
    bits: Mapping[Kind, int]
    group: int
    batch: int
    chunk: int
    tallies: dict[str, Tally] = field(default_factory=dict)

    def run(
        self, model: Model, tokens_BL: Tensor | None, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Quantize all layers and the head; yield what the record keeps of each MoE block.

        Without tokens nothing is measured: the planner and the backend must not need it.

        Raises:
            UserError: the head is to be quantized but has the embeddings' weights, or calibration
                made activations that are not finite.
        """
        head = self._head(model.network)
        anatomy, stream = model.anatomy, None
        with ExitStack() as stack:
            if tokens_BL is not None:
                stream = LayerStream(model.network, anatomy.layers, tokens_BL, self.batch)
                stack.enter_context(stream)
            for index, layer in enumerate(progress.track(anatomy.layers, "quantizing layers")):
                blocks = [block for block in anatomy.moe if block.layer == index]
                with resident(layer) if stream is None else _staying(stream, index):
                    yield from self._layer(index, layer, blocks, stream)
        if head is not None:
            with resident(head.linear):
                self._linear(head, None)

    def _layer(
        self, index: int, layer: nn.Module, blocks: list[MoEBlock], stream: LayerStream | None
    ) -> Iterator[dict[str, Any]]:
        """Show a layer what calibration brings, quantize it, and send the text on through it."""
        places = [p for p in linears(layer, blocks) if self.bits[p.kind] != UNTOUCHED]
        planners = {block: self.planner(block) for block in blocks}
        seen = _Seen({}, {})
        if stream is not None:
            if self.backend.kind == "gptq":
                inputs = {place.linear: _hessian(place.linear) for place in places}
                seen = _Seen({block: BlockHessians(block) for block in blocks}, inputs)
            with observing(seen.beside(planners), self.chunk), watching(seen.inputs):
                stream.run(index, advance=False)
        for block, planner in planners.items():
            yield self._block(block, planner, seen.experts.get(block))
        for place in places:
            self._linear(place, seen.inputs.get(place.linear))
        if stream is not None:
            stream.run(index, advance=True)

    def _block(
        self, block: MoEBlock, planner: Planner, seen: BlockHessians | None
    ) -> dict[str, Any]:
        """Put packed experts in the place of a block's own and say what they are."""
        if seen is not None:
            seen.refuse_not_finite()
        plans, packed = planner.plans(), []
        before = self.backend.used.copy()
        for expert, plan in enumerate(plans):
            hessians = None if seen is None else seen.experts[expert]
            packed.append(self.backend.expert(block.expert(expert), plan, hessians))
        block.block.experts = PackedExperts(packed)
        shapes = [shape for plan in plans for shape in plan.shapes]
        here = Tally()
        for tally in (here, self.tallies.setdefault("experts", Tally())):
            tally.add(3 * block.d_model * sum(block.widths), shapes)
        return {
            "layer": block.layer,
            "name": block.name,
            **here.summary(),
            "weights_by_bits": spread(shapes),
            "rounding": dict(self.backend.used - before),
            **planner.details(),
        }

    def _linear(self, place: Place, seen: Hessian | None) -> None:
        """Replace a linear layer by a packed one."""
        rows, columns = place.linear.weight.shape
        level = Level(self.bits[place.kind], rows)
        shape = PackedShape(rows, columns, (level,), group=self.group)
        place.put(self.backend.linear(place.linear, shape, seen))
        self.tallies.setdefault(place.kind, Tally()).add(rows * columns, [shape])

    def _head(self, network: Any) -> Place | None:
        """Return the head if it is to be quantized; it is rounded to nearest."""
        head = network.get_output_embeddings()
        if self.bits["head"] == UNTOUCHED or head is None:
            return None
        if head.weight is network.get_input_embeddings().weight:
            raise UserError("the head's weights are those of the embeddings: set head_bits=16")
        name = next(name for name, module in network.named_modules() if module is head)
        return Place("head", network, name, head)


@contextmanager
def _staying(stream: LayerStream, index: int) -> Iterator[None]:
    """Bring a layer's weights, which stay until the stream goes on."""
    stream.stay_in(index)
    yield


@dataclass
class _Seen:
    """The Hessians of a layer: those of its MoE blocks, and those of its other linear layers."""

    experts: dict[MoEBlock, BlockHessians]
    inputs: dict[nn.Linear, Hessian]

    def beside(self, planners: Mapping[MoEBlock, Planner]) -> dict[MoEBlock, Observer]:
        """Return, for every block, its planner and its Hessians as one observer."""
        return {
            block: Several([o for o in (planner, self.experts.get(block)) if o is not None])
            for block, planner in planners.items()
        }


def _hessian(linear: nn.Linear) -> Hessian:
    """Return an empty Hessian for a layer's inputs."""
    return Hessian(linear.in_features, linear.weight.device)
