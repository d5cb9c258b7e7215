"""Base class of methods that quantize a MoE model: options, layer walk, report."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from bench.method import (
    Context,
    InputSize,
    LayerReport,
    Method,
    MethodReport,
    MethodWork,
    RepeatedStep,
    WeightForm,
)
from bench.models.bitpacking.packed_shape import GridKind, Level, PackedShape
from bench.models.model import Model
from bench.models.network import stored_bytes
from bench.models.structure.dense_layer import shape_of
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.moe.pruning import (
    refuse_packed,
    require_calibration,
    require_micro_experts,
    require_usual_experts,
)
from methods.moe.quantizer.grid import Clip
from methods.moe.quantizer.layer_walk import (
    UNQUANTIZED_BITS,
    LinearRole,
    Quantizer,
    find_linears,
)
from methods.moe.quantizer.observers import BlockPacker, Planner
from methods.moe.quantizer.rounding import (
    Rounder,
    dequantization_step,
    packed_expert_step,
    rounding_step,
)

BitWidth = Annotated[int, Field(ge=1, le=8)]


def check_falling(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Require strictly falling bits: levels are assigned in this order."""
    if list(bits) != sorted(set(bits), reverse=True):
        raise ValueError("list each bit width once, in falling order")
    return bits


def require_mean_between(mean: float, bits: tuple[int, ...]) -> None:
    """Require a mean between the smallest and the largest of falling bits."""
    # Written so that NaN is refused as well.
    if not bits[-1] <= mean <= bits[0]:
        raise ValueError(f"mean_bits={mean} must be between {bits[-1]} and {bits[0]}")


BitChoices = Annotated[tuple[BitWidth, ...], Field(min_length=1), AfterValidator(check_falling)]
BitWidthOrUnquantized = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16]


class MoEQuantization(Method):
    """A method that packs the routed experts; the planner of a subclass allocates their bits.

    In a decoder without experts, the feed-forward of every layer counts as a block of one expert.
    Outside the blocks there is one bit width per role, where 16 means unquantized: attention,
    shared experts, the dense feed-forward layers of a MoE model, and the head, which is rounded to
    nearest. Routers and embeddings are never quantized. The papers do not state these widths; 8 for
    attention and shared experts is what a later comparison (DartMoQP) used for all methods.

    Every row has one grid per `group` input columns, which spans the least to the greatest weight
    or, with `clip=mse`, the range of least squared error. `grid` is the kind of grid: one with any
    `offset`, one with a `zero_point` (0 is one of its values), or one that is `symmetric` about 0.
    Inference engines support the last two, which need at least 2 bits. GPTQ adds `damping` times
    the mean diagonal to a Hessian; experts with fewer than `min_tokens` calibration tokens are
    rounded to nearest.
    """

    uses_calibration: ClassVar[bool] = True
    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain", "ragged"})

    rounding: Literal["gptq", "rtn"] = "gptq"
    group: int = Field(default=128, ge=1)
    clip: Clip = "minmax"
    grid: GridKind = "offset"
    damping: float = Field(default=0.01, gt=0)
    min_tokens: int = Field(default=32, ge=1)
    attention_bits: BitWidthOrUnquantized = 8
    shared_bits: BitWidthOrUnquantized = 8
    dense_bits: BitWidthOrUnquantized = 8
    head_bits: BitWidthOrUnquantized = 16
    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _check_bits_of_grid(self) -> Self:
        if self.grid != "offset" and 1 in self.bit_widths:
            raise ValueError(f"grid={self.grid} needs at least 2 bits: use grid=offset for 1 bit")
        return self

    @property
    def bit_widths(self) -> set[int]:
        """All bit widths that weights can get, 16 for unquantized ones."""
        others = {self.attention_bits, self.shared_bits, self.dense_bits, self.head_bits}
        # Subclasses declare the bits of the experts, as one width or as several.
        expert_bits: int | tuple[int, ...] = getattr(self, "bits", ())
        return others | ({expert_bits} if isinstance(expert_bits, int) else set(expert_bits))

    @property
    def leaves(self) -> WeightForm:
        """Routed experts are packed, whatever the bits of the rest."""
        return "packed"

    @abstractmethod
    def planners(
        self, model: Model, context: Context
    ) -> Callable[[MoEBlock], Planner | BlockPacker]:
        """Return the factory of planners: observers of a block that plan the bits of its experts.

        Called before any layer changes, so a method may measure the whole model first.
        """

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model without experts or feed-forward layers of a known form."""
        require_usual_experts(self.blocks(structure), type(self).__name__)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the walk, the rounding of every matrix, and the dequantization in later calls."""
        blocks = self.blocks(structure)
        packed = self.packed_shapes(structure, blocks)
        walk = MethodWork(
            forwards=2.0 * self.uses_calibration,
            observed=1.0 * self.uses_calibration,
            readings=2.0,
            per_call=tuple(self._steps_per_call(structure, blocks)),
        )
        if not self.uses_calibration or self.rounding == "rtn":
            return walk
        held = max(block.num_experts * (block.d_model**2 + block.d_ff**2) for block in blocks)
        return replace(
            walk,
            # Gram matrices: each expert sees its share of the tokens.
            flops=sum(
                2 * inputs.tokens * chosen * shape.columns**2 * count
                for (shape, chosen), count in packed.items()
            ),
            steps=self.rounding_steps(packed),
            memory=4.0 * held,
        )

    def _steps_per_call(
        self, structure: ModelStructure, blocks: Sequence[MoEBlock]
    ) -> Iterator[RepeatedStep]:
        """Yield what later calls add: packed routed experts, and matrices that all tokens see."""
        experts = Counter[tuple[PackedShape, ...]]()
        for block in blocks:
            if block.top_k < block.num_experts and (shapes := self._expert_shapes(block)):
                experts[shapes] += block.num_experts
        for (entering, down), count in experts.items():
            yield packed_expert_step(entering, down, count)
        matrices = self.packed_shapes(structure, blocks, routed=False)
        for (shape, _), count in matrices.items():
            yield dequantization_step(shape, count)

    def rounding_steps(
        self, packed: Mapping[tuple[PackedShape, float], int]
    ) -> tuple[RepeatedStep, ...]:
        """Return the steps that round matrices by GPTQ."""
        return tuple(rounding_step(shape, n, self._rounder) for (shape, _), n in packed.items())

    def packed_shapes(
        self, structure: ModelStructure, blocks: Sequence[MoEBlock], *, routed: bool = True
    ) -> Counter[tuple[PackedShape, float]]:
        """Count the matrices to pack by shape and by the share of tokens that they see.

        Without `routed` only those that all tokens see. Gate and up of an expert are one matrix, as
        they share a Hessian.
        """
        shapes = Counter[tuple[PackedShape, float]]()
        for block in blocks:
            if routed or block.top_k == block.num_experts:
                for shape in self._expert_shapes(block):
                    shapes[shape, block.top_k / block.num_experts] += block.num_experts
        for index, layer in enumerate(structure.layers):
            for slot in find_linears(layer, [block for block in blocks if block.layer == index]):
                bits = self._bits_by_role[slot.role]
                if bits < UNQUANTIZED_BITS:
                    shapes[self._matrix_shape(*shape_of(slot.linear), bits), 1.0] += 1
        return shapes

    def _expert_shapes(self, block: MoEBlock) -> tuple[PackedShape, ...]:
        """Return the shapes of gate and up together, and of down; none of experts without width.

        Of bits that are chosen among several, those in the middle stand for all.
        """
        own: int | tuple[int, ...] = getattr(self, "bits", 4)
        # Nothing is stored at 0 bits.
        choices = [own] if isinstance(own, int) else [bits for bits in own if bits]
        if not choices or not block.d_ff:
            return ()
        bits = choices[len(choices) // 2]
        return (
            self._matrix_shape(2 * block.d_ff, block.d_model, bits),
            self._matrix_shape(block.d_model, block.d_ff, bits),
        )

    def _matrix_shape(self, rows: int, columns: int, bits: int) -> PackedShape:
        return PackedShape(rows, columns, (Level(bits, rows),), group=self.group, grid=self.grid)

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the blocks that are packed by plan."""
        return require_micro_experts(structure, type(self).__name__)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Quantize layer by layer; the report holds the bits of every block."""
        # Packed weights cannot be quantized again. Offloaded weights can: the walk onloads them.
        refuse_packed(model.structure.micro_expert_blocks)
        started, before = time.perf_counter(), stored_bytes(model.network)
        calibration = require_calibration(context) if self.uses_calibration else None
        quantizer = self._quantizer(self.planners(model, context))
        tokens_BL = None if calibration is None else calibration.tokens
        # Exhausted here: the generator quantizes as it is consumed.
        layers = list(quantizer.run(model, tokens_BL, context.progress))
        model.invalidate_structure()
        details: dict[str, object] = {
            "bits": {kind: tally.summary() for kind, tally in quantizer.bit_counts.items()},
            "bytes_before": before,
            "bytes_after": stored_bytes(model.network),
            "rounding": dict(quantizer.rounder.counts),
            "calibration": None if calibration is None else calibration.fingerprint,
            "tokens": 0 if calibration is None else calibration.tokens.numel(),
            "seconds": time.perf_counter() - started,
        }
        return MethodReport(
            "quantized", details, [LayerReport.model_validate(layer) for layer in layers]
        )

    @property
    def _rounder(self) -> Rounder:
        return Rounder(self.rounding, self.clip, self.grid, self.damping, self.min_tokens)

    @property
    def _bits_by_role(self) -> dict[LinearRole, int]:
        return {
            "attention": self.attention_bits,
            "shared": self.shared_bits,
            "dense": self.dense_bits,
            "head": self.head_bits,
        }

    def _quantizer(self, planner: Callable[[MoEBlock], Planner | BlockPacker]) -> Quantizer:
        return Quantizer(
            rounder=self._rounder,
            planner=planner,
            bits=self._bits_by_role,
            group=self.group,
            batch=self.batch,
            chunk=self.chunk,
        )
