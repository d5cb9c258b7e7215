"""Layer-by-layer quantization: each layer is calibrated on the quantized layers before it."""

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
    """Quantizes a network; `tallies` accumulates the bits used, by kind of weight.

    `bits` are the bit widths of everything but the routed experts, whose plans `planner` makes; 16
    leaves weights unquantized. `batch` rows pass through a layer together, and observers see at
    most `chunk` tokens at a time.
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
        """Quantize all layers and the head; yield the record entry of each MoE block.

        Without tokens nothing is observed: planner and rounder must then work without calibration.

        Raises:
            UserError: the head is to be quantized but is tied to the embeddings, or
                calibration produced activations that are not finite.
        """
        # Checked first: a tied head has to fail before hours of quantization, not after.
        head = self._head(model.network)
        anatomy, stream = model.anatomy, None
        with ExitStack() as stack:
            if tokens_BL is not None:
                stream = LayerStream(model.network, anatomy.layers, tokens_BL, self.batch)
                stack.enter_context(stream)
            for index, layer in enumerate(progress.track(anatomy.layers, "quantizing layers")):
                blocks = [block for block in anatomy.moe if block.layer == index]
                # A stream owns the onloading of its layers; without one each layer is onloaded
                # here.
                with resident(layer) if stream is None else _staying(stream, index):
                    yield from self._layer(index, layer, blocks, stream)
        if head is not None:
            with resident(head.linear):
                # No Hessian: the stream ends at the last layer, before the final norm and the head.
                self._linear(head, None)

    def _layer(
        self, index: int, layer: nn.Module, blocks: list[MoEBlock], stream: LayerStream | None
    ) -> Iterator[dict[str, Any]]:
        """Observe a layer, quantize it, and advance the calibration text through it."""
        places = [p for p in linears(layer, blocks) if self.bits[p.kind] != UNTOUCHED]
        planners = {block: self.planner(block) for block in blocks}
        seen = _Seen({}, {})
        if stream is not None:
            # Hessians cost D² + F² floats per expert; rounding to nearest does not need them.
            if self.backend.kind == "gptq":
                inputs = {place.linear: _hessian(place.linear) for place in places}
                seen = _Seen({block: BlockHessians(block) for block in blocks}, inputs)
            # A layer runs twice. Once with its original weights, to measure its true inputs and
            # hidden states; the hidden states between layers do not advance.
            with observing(seen.beside(planners), self.chunk), watching(seen.inputs):
                stream.run(index, advance=False)
        for block, planner in planners.items():
            yield self._block(block, planner, seen.experts.get(block))
        for place in places:
            self._linear(place, seen.inputs.get(place.linear))
        if stream is not None:
            # Once more, quantized: the next layer is calibrated on inputs that contain the errors
            # made so far, as in GPTQ, so it can compensate for them.
            stream.run(index, advance=True)

    def _block(
        self, block: MoEBlock, planner: Planner, seen: BlockHessians | None
    ) -> dict[str, Any]:
        """Replace a block's experts by packed ones; return its record entry."""
        if seen is not None:
            seen.refuse_not_finite()
        plans, packed = planner.plans(), []
        before = self.backend.used.copy()
        for expert, plan in enumerate(plans):
            hessians = None if seen is None else seen.experts[expert]
            packed.append(self.backend.expert(block.expert(expert), plan, hessians))
        block.block.experts = PackedExperts(packed)
        # Bits are relative to the weights before: removed micro-experts count as 0 bits.
        shapes = [shape for plan in plans for shape in plan.shapes]
        here = Tally()
        for tally in (here, self.tallies.setdefault("experts", Tally())):
            tally.add(3 * block.d_model * sum(block.widths), shapes)
        return {
            "layer": block.layer,
            "name": block.name,
            **here.summary(),
            "weights_by_bits": spread(shapes),
            # Counter subtraction: only what this block added.
            "rounding": dict(self.backend.used - before),
            **planner.details(),
        }

    def _linear(self, place: Place, seen: Hessian | None) -> None:
        rows, columns = place.linear.weight.shape
        level = Level(self.bits[place.kind], rows)
        shape = PackedShape(rows, columns, (level,), group=self.group)
        place.put(self.backend.linear(place.linear, shape, seen))
        self.tallies.setdefault(place.kind, Tally()).add(rows * columns, [shape])

    def _head(self, network: Any) -> Place | None:
        """Return the head if it is to be quantized. It is rounded to nearest."""
        head = network.get_output_embeddings()
        if self.bits["head"] == UNTOUCHED or head is None:
            return None
        # Packing a tied head would either break the tie or change the embeddings.
        if head.weight is network.get_input_embeddings().weight:
            raise UserError(
                "cannot quantize lm_head, which is tied to the embeddings: set head_bits=16"
            )
        name = next(name for name, module in network.named_modules() if module is head)
        return Place("head", network, name, head)


@contextmanager
def _staying(stream: LayerStream, index: int) -> Iterator[None]:
    """Onload a layer; its weights stay until the stream moves to the next one."""
    stream.stay_in(index)
    yield


@dataclass
class _Seen:
    """Hessians of one layer: those of its MoE blocks and those of its other linear layers."""

    experts: dict[MoEBlock, BlockHessians]
    inputs: dict[nn.Linear, Hessian]

    def beside(self, planners: Mapping[MoEBlock, Planner]) -> dict[MoEBlock, Observer]:
        """Combine the planner and the Hessians of every block into one observer."""
        return {
            block: Several([o for o in (planner, self.experts.get(block)) if o is not None])
            for block, planner in planners.items()
        }


def _hessian(linear: nn.Linear) -> Hessian:
    return Hessian(linear.in_features, linear.weight.device)
