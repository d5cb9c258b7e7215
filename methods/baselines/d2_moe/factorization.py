"""Base expert and low-rank differences of a block, from calibration statistics.

Shapes: E routed experts, S tokens of one expert, T tokens, D d_model, F an expert's width, O
outputs and I inputs of a matrix, R rank.

The differences are approximated optimally for the calibration inputs. For inputs X [S, I] with Gram
matrix H = Xᵀ X = L Lᵀ, ‖(Δ - U V) Xᵀ‖_F = ‖(Δ - U V) L‖_F. The truncated SVD of Δ L, multiplied by
L⁻¹, is therefore optimal for its rank (SVD-LLM, arXiv 2403.07378).

The base expert is the mean of the experts, weighted by Fisher information. Elementwise for each
matrix, with F_e = mean over calibration rows of (∂L/∂W_e)² and f_e the number
of tokens routed to e,

    W_base = Σ_e f_e F_e W_e / Σ_e f_e F_e

The factor f_e is taken from the released code. Both sums are linear in the squared gradients, so
they are accumulated row by row and no expert's F_e is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bench.models.structure.expert_view import gated_projections
from bench.models.structure.moe_block import MoEBlock
from methods.baselines.d2_moe.shared_base_experts import (
    MATRIX_NAMES,
    SharedBaseExperts,
    SharedMatrix,
)
from methods.moe.calibration import NullObserver, require_finite


class InputMoments(NullObserver):
    """Observer of Xᵀ X of each routed expert: inputs [D, D] and hidden states [F, F]."""

    def __init__(self, block: MoEBlock) -> None:
        down = block.expert(0).down
        sizes = (block.num_experts, block.d_model), (block.num_experts, block.d_ff)
        self.input_gram_EDD, self.hidden_gram_EFF = (
            torch.zeros(count, size, size, dtype=torch.float64, device=down.device)
            for count, size in sizes
        )

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert, without router weights."""
        self.input_gram_EDD[expert] += x_SD.float().mT @ x_SD.float()
        self.hidden_gram_EFF[expert] += hidden_SF.float().mT @ hidden_SF.float()


def assemble_experts(
    block: MoEBlock, base: GateUpDown, inputs: InputMoments, ranks: Sequence[int], damping: float
) -> SharedBaseExperts:
    """Build the shared-base experts of a block, in the dtype of the model.

    `ranks` lists gate, up and down rank expert by expert.

    Raises:
        UserError: an activation was NaN or infinite.
    """
    require_finite(block, inputs.input_gram_EDD, inputs.hidden_gram_EFF)
    # Gate and up read the same inputs.
    grams = (inputs.input_gram_EDD, inputs.input_gram_EDD, inputs.hidden_gram_EFF)
    matrices = {
        # ranks[place::3] picks one matrix out of (gate, up, down) per expert.
        name: _shared_matrix(block, name, base_OI, gram_EII, ranks[place::3], damping)
        for place, (name, base_OI, gram_EII) in enumerate(
            zip(MATRIX_NAMES, base, grams, strict=True)
        )
    }
    return SharedBaseExperts(matrices, block.expert(0).act)


def _shared_matrix(
    block: MoEBlock,
    name: str,
    base_OI: Tensor,
    gram_EII: Tensor,
    ranks: Sequence[int],
    damping: float,
) -> SharedMatrix:
    weights = [getattr(block.expert(expert), name) for expert in range(block.num_experts)]
    # Relative to the base as stored, so that the factors also correct its rounding error.
    base_OI = base_OI.to(weights[0].dtype)
    factors = [
        low_rank_factors(weight_OI.double() - base_OI.double(), gram_II, rank, damping)
        for weight_OI, gram_II, rank in zip(weights, gram_EII, ranks, strict=True)
    ]
    left_OR = torch.cat([left for left, _ in factors], dim=1).to(base_OI.dtype)
    right_RI = torch.cat([right for _, right in factors]).to(base_OI.dtype)
    return SharedMatrix(base_OI, left_OR, right_RI, ranks)


def low_rank_factors(
    delta_OI: Tensor, gram_II: Tensor, rank: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Return U [O, R] and V [R, I], float64, with singular values split evenly between them.

    `damping` times the mean diagonal of H is added to its diagonal, since H is singular for an
    expert with fewer tokens than inputs. An expert without tokens gets the plain SVD.
    """
    root_II = _damped_cholesky(gram_II.double(), damping)
    left_OK, value_K, right_KI = torch.linalg.svd(delta_OI.double() @ root_II, full_matrices=False)
    # Square roots on both sides balance the magnitudes of U and V, which are stored in half
    # precision.
    share_R = value_K[:rank].sqrt()
    # Solves V L = right instead of inverting L.
    right_RI = torch.linalg.solve_triangular(root_II, right_KI[:rank], upper=False, left=False)
    return left_OK[:, :rank] * share_R, share_R[:, None] * right_RI


def _damped_cholesky(gram_II: Tensor, damping: float) -> Tensor:
    """Return L, lower triangular, with L Lᵀ = H + damping · mean(diag H) · I."""
    identity_II = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    scale = gram_II.diagonal().mean()
    # Written so that NaN takes this branch as well.
    if not scale > 0:
        return identity_II
    root_II: Tensor = torch.linalg.cholesky(gram_II + damping * scale * identity_II)
    return root_II


GateUpDown = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ExpertMatrices:
    """A parameter that holds one matrix (`matrix`) of some experts."""

    weight: nn.Parameter
    experts: tuple[int, ...]
    matrix: str

    def per_expert(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (expert, its part [O, I]) of a tensor shaped like the parameter."""
        yield from zip(self.experts, tensor if tensor.ndim == 3 else tensor[None], strict=True)


def expert_matrices(block: MoEBlock) -> list[ExpertMatrices]:
    """Return the parameters of the routed experts of a block; fused gate and up are one matrix."""
    if block.layout == "fused":
        everyone = tuple(range(block.num_experts))
        names = {"gate_up": "gate_up_proj", "down": "down_proj"}
        return [
            ExpertMatrices(getattr(block.experts, n), everyone, matrix)
            for matrix, n in names.items()
        ]
    found = []
    for expert in range(block.num_experts):
        linears = gated_projections(block.experts.get_submodule(str(expert)))
        assert linears is not None
        for matrix, linear in zip(("gate", "up", "down"), linears, strict=True):
            found.append(ExpertMatrices(cast(nn.Parameter, linear.weight), (expert,), matrix))
    return found


class FisherMean:
    """Accumulates both sums of one block from gradients, row by row."""

    def __init__(self, block: MoEBlock, frequency_E: Tensor) -> None:
        self.sources = expert_matrices(block)
        self._frequency: list[float] = frequency_E.tolist()
        self._weighted: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        for source in self.sources:
            for _, weight_OI in source.per_expert(source.weight):
                zeros = torch.zeros_like(weight_OI, dtype=torch.float64, requires_grad=False)
                # One sum per kind of matrix, shared by all experts of the block.
                self._weighted.setdefault(source.matrix, zeros)
                self._total.setdefault(source.matrix, zeros.clone())

    @contextmanager
    def accumulate_gradients(self) -> Iterator[None]:
        """Accumulate gradients as they arrive, and free them."""
        with ExitStack() as stack:
            for source in self.sources:
                # The hook runs as soon as the gradient of one parameter is complete, so the
                # gradients of all experts are never in memory together.
                handle = source.weight.register_post_accumulate_grad_hook(
                    self._accumulation_hook(source)
                )
                stack.callback(handle.remove)
            yield

    def _accumulation_hook(self, source: ExpertMatrices) -> Callable[[Tensor], None]:
        def accumulate(weight: Tensor) -> None:
            # Freed at once, which also makes the next row start from zero: the sum is over squares
            # of single rows.
            gradient, weight.grad = cast(Tensor, weight.grad), None
            pairs = zip(
                source.per_expert(gradient), source.per_expert(weight.detach()), strict=True
            )
            for (expert, gradient_OI), (_, weight_OI) in pairs:
                fisher_OI = self._frequency[expert] * gradient_OI.double().square()
                self._total[source.matrix] += fisher_OI
                self._weighted[source.matrix] += fisher_OI * weight_OI.double()

        return accumulate

    def base(self) -> GateUpDown:
        """Return (gate, up, down) of the base expert, float64.

        Elements for which no expert got a gradient in any row are the plain mean.
        """
        merged = {name: self._merged(name) for name in self._total}
        if "gate_up" in merged:
            gate_FD, up_FD = merged["gate_up"].chunk(2)
            return gate_FD, up_FD, merged["down"]
        return merged["gate"], merged["up"], merged["down"]

    def _merged(self, matrix: str) -> Tensor:
        mine = [source for source in self.sources if source.matrix == matrix]
        parts = [part for s in mine for _, part in s.per_expert(s.weight.detach())]
        mean_OI = torch.stack(parts).mean(0, dtype=torch.float64)
        total_OI = self._total[matrix]
        # torch.where discards the NaN of 0 / 0.
        return torch.where(total_OI > 0, self._weighted[matrix] / total_OI, mean_OI)
