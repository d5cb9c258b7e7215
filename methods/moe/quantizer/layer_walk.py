"""Layer walk of quantization: each layer is calibrated on the outputs of quantized layers.

Routed experts are quantized by plan; the linear layers outside them have one bit width per role.

Shapes: S tokens, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.bitpacking.packed_modules import PackedExpert, PackedExperts
from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.expert_hooks import ExpertObserver, observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.offload import onloaded
from bench.models.structure.dense_layer import is_projection, shape_of
from bench.models.structure.expert_view import activation_of, gated_projections
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.calibration import Gram, observe_inputs
from methods.moe.micro_experts import replace_child
from methods.moe.quantizer.bit_budget import BitCount, weights_by_bits
from methods.moe.quantizer.expert_plan import matrix_weights
from methods.moe.quantizer.observers import (
    BlockHessians,
    BlockPacker,
    CompositeObserver,
    Planner,
)
from methods.moe.quantizer.rounding import Rounder

UNQUANTIZED_BITS = 16
LinearRole = Literal["attention", "dense", "shared", "head"]


@dataclass
class Quantizer:
    """Quantizes a network; `bit_counts` accumulates the bits used, by kind of weight.

    `planner` makes the plans of the routed experts. `bits` are the bit widths of all other linear
    layers by role; 16 leaves them unquantized. `batch` rows pass through a layer at a time, and
    observers get at most `chunk` tokens.
    """

    rounder: Rounder
    planner: Callable[[MoEBlock], Planner | BlockPacker]
    bits: Mapping[LinearRole, int]
    group: int
    batch: int
    chunk: int
    bit_counts: dict[str, BitCount] = field(default_factory=dict)

    def run(
        self, model: Model, tokens_BL: Tensor | None, progress: Progress
    ) -> Iterator[dict[str, object]]:
        """Quantize all layers and the head; yield the record entry of each MoE block.

        Without tokens nothing is observed; planner and rounder must then need no calibration.

        Raises:
            UserError: the head is to be quantized but is tied to the embeddings, or
                calibration produced activations that are not finite.
        """
        # Checked first: a tied head has to fail before hours of quantization, not after.
        head = self._head(model.network)
        structure, stream = model.structure, None
        last = len(structure.layers) - 1
        with ExitStack() as stack:
            if tokens_BL is not None:
                stream = LayerStream(model.network, structure.layers, tokens_BL, self.batch)
                stack.enter_context(stream)
            for index, layer in enumerate(progress.track(structure.layers, "quantizing layers")):
                blocks = [b for b in structure.micro_expert_blocks if b.layer == index]
                # A stream owns the onloading of its layers; without one each layer is onloaded
                # here.
                with onloaded(layer) if stream is None else _onloaded_layer(stream, index):
                    yield from self._layer(index, layer, blocks, stream, last=index == last)
        if head is not None:
            with onloaded(head.linear):
                # No Hessian: the stream ends at the last layer, before the final norm and the head.
                self._linear(head, None)

    def _layer(
        self,
        index: int,
        layer: nn.Module,
        blocks: list[MoEBlock],
        stream: LayerStream | None,
        *,
        last: bool,
    ) -> Iterator[dict[str, object]]:
        """Observe a layer, quantize it, and advance the calibration text to the next one."""
        slots = [
            slot for slot in find_linears(layer, blocks) if self.bits[slot.role] != UNQUANTIZED_BITS
        ]
        planners = {block: self.planner(block) for block in blocks}
        hessians = _LayerHessians({}, {})
        if stream is not None:
            # Hessians cost D² + F² floats per expert; rounding to nearest does not need them.
            if self.rounder.kind == "gptq":
                inputs = {slot.linear: Gram.of_inputs(slot.linear) for slot in slots}
                # A planner that packs a block itself collects what it needs.
                own = [block for block in blocks if not isinstance(planners[block], BlockPacker)]
                hessians = _LayerHessians({block: BlockHessians(block) for block in own}, inputs)
            # A layer runs twice. Once with its original weights, to measure its true inputs and
            # hidden states; the hidden states between layers do not advance.
            with (
                observe_experts(hessians.observers(planners), self.chunk),
                observe_inputs(hessians.inputs),
            ):
                stream.run(index, advance=False)
        for block, planner in planners.items():
            yield self._block(block, planner, hessians.experts.get(block))
        for slot in slots:
            self._linear(slot, hessians.inputs.get(slot.linear))
        # Nothing reads the output of the last layer.
        if stream is not None and not last:
            # The second run, quantized: as in GPTQ, the next layer is calibrated on inputs that
            # contain the errors made so far, so it can compensate for them.
            stream.run(index, advance=True)

    def _block(
        self, block: MoEBlock, planner: Planner | BlockPacker, observed: BlockHessians | None
    ) -> dict[str, object]:
        """Replace a block's experts by packed ones; return its record entry."""
        if observed is not None:
            observed.require_finite()
        before = self.rounder.counts.copy()
        shapes, beside = self._pack(block, planner, observed)
        # Bits are relative to the weights before: removed micro-experts count as 0 bits.
        block_count = BitCount()
        for tally in (block_count, self.bit_counts.setdefault("experts", BitCount())):
            tally.add(matrix_weights(block), shapes, beside)
        return {
            "layer": block.layer,
            "name": block.name,
            **block_count.summary(),
            "weights_by_bits": weights_by_bits(shapes),
            # Counter subtraction: only what this block added.
            "rounding": dict(self.rounder.counts - before),
            **planner.details(),
        }

    def _pack(
        self, block: MoEBlock, planner: Planner | BlockPacker, observed: BlockHessians | None
    ) -> tuple[Sequence[PackedShape], int]:
        """Replace a block's experts; return their packed shapes, and the bits stored beside them.

        They become the planner's own module, or are packed one by one.
        """
        if isinstance(planner, BlockPacker):
            whole = planner.pack(block)
            replace_child(block.block, block.experts, whole.experts)
            return whole.shapes, whole.bits_beside
        packed = []
        for expert, plan in enumerate(planner.plans()):
            hessians = None if observed is None else observed.experts[expert]
            packed.append(self.rounder.expert(block.expert(expert), plan, hessians))
        if block.feed_forward is not None:
            (matrices,) = packed
            block.feed_forward.replace(matrices[:-1], matrices[-1])
        else:
            act = activation_of(block.experts)
            experts = [PackedExpert(gate, up, down, act) for gate, up, down in packed]
            replace_child(block.block, block.experts, PackedExperts(experts))
        return [linear.shape for matrices in packed for linear in matrices], 0

    def _linear(self, slot: LinearSlot, hessian: Gram | None) -> None:
        rows, columns = shape_of(slot.linear)
        level = Level(self.bits[slot.role], rows)
        shape = PackedShape(rows, columns, (level,), group=self.group)
        packed = self.rounder.linear(slot.linear, shape, hessian)
        slot.replace(packed)
        self.bit_counts.setdefault(slot.role, BitCount()).add(rows * columns, [packed.shape])

    def _head(self, network: Any) -> LinearSlot | None:
        """Return the head if it is to be quantized."""
        head = network.get_output_embeddings()
        if self.bits["head"] == UNQUANTIZED_BITS or head is None:
            return None
        # Packing a tied head would either break the tie or change the embeddings.
        if head.weight is network.get_input_embeddings().weight:
            raise UserError(
                "cannot quantize lm_head, which is tied to the embeddings: set head_bits=16"
            )
        name = next(name for name, module in network.named_modules() if module is head)
        return LinearSlot("head", network, name, head)


@contextmanager
def _onloaded_layer(stream: LayerStream, index: int) -> Iterator[None]:
    """Onload a layer; its weights stay loaded until the stream moves to the next layer."""
    stream.onload_layer(index)
    yield


@dataclass
class _LayerHessians:
    """Hessians of one layer: those of its MoE blocks and those of its other linear layers."""

    experts: dict[MoEBlock, BlockHessians]
    inputs: dict[nn.Module, Gram]

    def observers(
        self, planners: Mapping[MoEBlock, ExpertObserver]
    ) -> dict[MoEBlock, ExpertObserver]:
        """Combine the planner and the Hessians of every block into one observer."""
        return {
            block: CompositeObserver(
                [o for o in (planner, self.experts.get(block)) if o is not None]
            )
            for block, planner in planners.items()
        }


@dataclass(frozen=True)
class LinearSlot:
    """A linear layer, its role, and its name relative to `owner`."""

    role: LinearRole
    owner: nn.Module
    name: str
    linear: nn.Module

    def replace(self, module: nn.Module) -> None:
        """Replace the layer."""
        self.owner.set_submodule(self.name, module)


def find_linears(layer: nn.Module, blocks: Sequence[MoEBlock]) -> list[LinearSlot]:
    """Return the linear layers of a decoder layer except routers and routed experts.

    The role of a gated feed-forward layer is `dense`, or `shared` in a MoE block; all others are
    `attention`.
    """
    shared = {m for b in blocks if b.shared is not None for m in b.shared.modules()}
    # Everything in a MoE block but the shared experts: routed experts have their own plans, and
    # routers and the gate of the shared experts are small, sensitive, and never quantized.
    routing = {m for b in blocks for m in b.modules} - shared
    # Recognised by structure and not by name, so this holds for all architectures.
    gated = {part for module in layer.modules() for part in gated_projections(module) or ()}
    found = []
    for name, module in layer.named_modules():
        if is_projection(module) and module not in routing:
            dense: LinearRole = "dense" if module in gated else "attention"
            found.append(LinearSlot("shared" if module in shared else dense, layer, name, module))
    return found
