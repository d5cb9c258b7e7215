"""Rounding of matrices and experts: to nearest, or by GPTQ given enough calibration tokens.

Shapes: R rows, C columns, D d_model, F an expert's width, f the kept micro-experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from bench.errors import UserError
from bench.method import RepeatedStep
from bench.models.bitpacking.packed_modules import PackedExpert, PackedExperts, PackedLinear
from bench.models.bitpacking.packed_shape import GridKind, Level, PackedShape
from bench.models.structure.dense_layer import weight_of
from bench.models.structure.expert_view import ExpertView
from methods.moe.calibration import Gram
from methods.moe.quantizer.expert_plan import ExpertPlan, MatrixPlan
from methods.moe.quantizer.gptq import (
    COLUMN_OPERATORS,
    column_walk_flops,
    gptq,
    inverse_factor,
)
from methods.moe.quantizer.grid import Clip, QuantizedMatrix, round_to_nearest, row_bits


@dataclass(frozen=True)
class ExpertHessians:
    """Second moments of an expert's inputs [D, D] and of its hidden states [F, F]."""

    inputs: Gram
    hidden: Gram


@dataclass
class Rounder:
    """Rounds and packs matrices; `counts` holds how many were rounded by `gptq`, `damped` or `rtn`.

    `damped` is GPTQ with more damping than configured. A matrix with fewer than `min_tokens`
    calibration tokens, or whose Hessian cannot be inverted, is rounded to nearest (`rtn`).
    """

    kind: Literal["rtn", "gptq"]
    clip: Clip = "minmax"
    grid: GridKind = "offset"
    damping: float = 0.01
    min_tokens: int = 32
    counts: Counter[str] = field(default_factory=Counter)

    def expert(
        self, view: ExpertView, plan: ExpertPlan, hessians: ExpertHessians | None
    ) -> list[PackedLinear]:
        """Pack the matrices of an expert, down last, according to its plan."""
        # Permuting the rows of gate and up and the columns of down alike leaves the expert's
        # function unchanged. Of the Hessians, only that of down has micro-experts as columns.
        order_f, inputs, hidden = plan.order_f, None, None
        if hessians is not None:
            inputs, hidden = hessians.inputs, hessians.hidden.select(order_f)
        packed = self._inputs(view.input_matrices(order_f), plan.inputs, inputs)
        packed.append(self.matrix(view.down[:, order_f], plan.down, hidden))
        biases = (*view.input_biases(order_f), view.down_bias)
        for linear, bias_R in zip(packed, biases, strict=True):
            if bias_R is not None:
                linear.bias = nn.Parameter(bias_R.clone(), requires_grad=False)
        return packed

    def linear(
        self, projection: nn.Module, shape: PackedShape, hessian: Gram | None
    ) -> PackedLinear:
        """Pack a linear layer; its bias is kept as it is."""
        packed = self.matrix(weight_of(projection), MatrixPlan(shape), hessian)
        packed.bias = cast(nn.Linear, projection).bias
        return packed

    def matrix(self, weight_RC: Tensor, plan: MatrixPlan, hessian: Gram | None) -> PackedLinear:
        """Pack one matrix according to its plan."""
        if plan.order_C is not None:
            weight_RC = weight_RC[:, plan.order_C]
            hessian = hessian.select(plan.order_C) if hessian is not None else None
        bits_RG = row_bits(plan.shape, weight_RC.device)
        return self._pack(weight_RC, plan, self._round(weight_RC, plan.shape, bits_RG, hessian))

    def _inputs(
        self, weights: Sequence[Tensor], plans: Sequence[MatrixPlan], hessian: Gram | None
    ) -> list[PackedLinear]:
        # A `tied_plan` uses one object for gate and up: same columns, same order, same bits. GPTQ
        # treats rows independently, so stacking the matrices gives the same codes as two calls,
        # with one inversion and one pass over the columns.
        if len(plans) == 1 or plans[0] is not plans[1]:
            pairs = zip(weights, plans, strict=True)
            return [self.matrix(weight_RC, plan, hessian) for weight_RC, plan in pairs]
        (gate_fD, up_fD), plan = weights, plans[0]
        width = len(gate_fD)
        bits_RG = row_bits(plan.shape, gate_fD.device).repeat(2, 1)
        both = self._round(torch.cat((gate_fD, up_fD)), plan.shape, bits_RG, hessian, matrices=2)
        halves = both.rows(slice(0, width)), both.rows(slice(width, 2 * width))
        return [self._pack(gate_fD, plan, half) for half in halves]

    def _round(
        self,
        weight_RC: Tensor,
        shape: PackedShape,
        bits_RG: Tensor,
        hessian: Gram | None,
        matrices: int = 1,
    ) -> QuantizedMatrix:
        if self.kind == "gptq" and hessian is not None and hessian.tokens >= self.min_tokens:
            found = inverse_factor(hessian, self.damping)
            if found is not None:
                factor_CC, damping = found
                self.counts["gptq" if damping == self.damping else "damped"] += matrices
                # The inversion needs float64; the loop over columns does not.
                groups = shape.groups()
                return gptq(weight_RC, factor_CC.float(), groups, bits_RG, self.clip, self.grid)
        self.counts["rtn"] += matrices
        return round_to_nearest(weight_RC, shape.groups(), bits_RG, self.clip, self.grid)

    def _pack(
        self, weight_RC: Tensor, plan: MatrixPlan, quantized: QuantizedMatrix
    ) -> PackedLinear:
        """Build the packed module, on the device and in the dtype of the weights."""
        # Scales are stored as float16, whose largest value is 65504.
        if not bool(quantized.scale.isfinite().all() & quantized.offset.isfinite().all()):
            raise UserError(
                "cannot quantize weights that are not finite or exceed the range of float16 scales"
            )
        # Plans state the bits but not the kind of grid.
        shape = replace(plan.shape, grid=self.grid)
        packed = PackedLinear(shape, weight_RC.dtype, device=weight_RC.device)
        packed.store(quantized.codes, quantized.scale, quantized.offset, plan.order_C)
        return packed


_DEQUANTIZE_OPERATORS = 40
"""Operators that unpack the codes of a matrix and apply its grids."""
_DEQUANTIZE_ELEMENTS = 5.0
"""Values per weight: its code as byte and as float32, a scale, an offset, and the result."""
_EXPERT_OPERATORS = 12
"""Operators that gather an expert's tokens, call it, and add its outputs to those of others."""


def rounding_step(shape: PackedShape, count: int, rounder: Rounder) -> RepeatedStep:
    """Return the step that rounds and packs one of `count` matrices by GPTQ, for an estimate."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
        weight_RC = torch.randn(shape.rows, shape.columns, device=device).to(dtype)
        x_SC = torch.randn(shape.columns, shape.columns, device=device)
        hessian = Gram(x_SC.T @ x_SC, max(shape.columns, rounder.min_tokens))
        # Of its own: the counts are of a run.
        own = replace(rounder, counts=Counter())
        return lambda: own.matrix(weight_RC, MatrixPlan(shape), hessian)

    return RepeatedStep(
        key=f"round {shape} {rounder.kind} {rounder.clip} {rounder.grid}",
        times=count,
        prepare=prepare,
        flops=column_walk_flops(shape.rows, shape.columns),
        operators=COLUMN_OPERATORS * shape.columns,
    )


def dequantization_step(shape: PackedShape, count: int) -> RepeatedStep:
    """Return the step that dequantizes one of `count` matrices in every call, for an estimate."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
        packed = _zeroed_matrix(shape, device, dtype)
        return lambda: packed.dense(dtype)

    return RepeatedStep(
        key=f"dequantize {shape}",
        times=count,
        prepare=prepare,
        elements=_DEQUANTIZE_ELEMENTS * shape.rows * shape.columns,
        operators=_DEQUANTIZE_OPERATORS,
    )


def packed_expert_step(entering: PackedShape, down: PackedShape, count: int) -> RepeatedStep:
    """Return the step that computes one of `count` packed routed experts in every call.

    It is an expert's call with a single token: besides the dequantization, the operators that a
    loop over experts takes. The products belong to the dense network. `entering` is the shape of
    gate and up together.
    """
    rows = entering.rows // 2
    half = replace(entering, rows=rows, levels=(Level(entering.levels[0].bits, rows),))
    shapes = (half, half, down)

    def prepare(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
        gate, up, last = (_zeroed_matrix(shape, device, dtype) for shape in shapes)
        experts = PackedExperts([PackedExpert(gate, up, last, silu)])
        x_TD = torch.zeros(1, half.columns, device=device, dtype=dtype)
        index_TK = torch.zeros(1, 1, device=device, dtype=torch.long)
        weight_TK = torch.ones(1, 1, device=device, dtype=dtype)
        return lambda: experts(x_TD, index_TK, weight_TK)

    return RepeatedStep(
        key=f"packed expert {half} {down}",
        times=count,
        prepare=prepare,
        elements=_DEQUANTIZE_ELEMENTS * sum(shape.rows * shape.columns for shape in shapes),
        operators=len(shapes) * _DEQUANTIZE_OPERATORS + _EXPERT_OPERATORS,
        routed=True,
    )


def _zeroed_matrix(shape: PackedShape, device: torch.device, dtype: torch.dtype) -> PackedLinear:
    packed = PackedLinear(shape, dtype, device=device)
    for buffer in packed.buffers():
        buffer.zero_()
    return packed
