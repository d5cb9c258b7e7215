"""Base expert of a block: the mean of its experts, weighted by Fisher information.

Shapes: E routed experts, O outputs and I inputs of a matrix.

Elementwise for each matrix, with F_e = mean over calibration rows of (∂L/∂W_e)² and f_e the number
of tokens routed to e,

    W_base = Σ_e f_e F_e W_e / Σ_e f_e F_e

The factor f_e is taken from the released code. Both sums are linear in the squared gradients, so
they are accumulated row by row and no expert's F_e is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bench.models.anatomy import MoEBlock
from bench.models.anatomy.expert import projections

Matrices = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """A parameter that holds one matrix (`matrix`) of some experts."""

    weight: nn.Parameter
    experts: tuple[int, ...]
    matrix: str

    def per_expert(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (expert, its part [O, I]) of a tensor shaped like the parameter."""
        yield from zip(self.experts, tensor if tensor.ndim == 3 else tensor[None], strict=True)


def sources(block: MoEBlock) -> list[Source]:
    """Return the parameters of the routed experts of a block; fused gate and up are one matrix."""
    if block.layout == "fused":
        everyone = tuple(range(block.num_experts))
        names = {"gate_up": "gate_up_proj", "down": "down_proj"}
        return [Source(getattr(block.experts, n), everyone, matrix) for matrix, n in names.items()]
    found = []
    for expert in range(block.num_experts):
        linears = projections(block.experts.get_submodule(str(expert)))
        assert linears is not None
        for matrix, linear in zip(("gate", "up", "down"), linears, strict=True):
            found.append(Source(cast(nn.Parameter, linear.weight), (expert,), matrix))
    return found


class FisherMean:
    """Accumulates both sums of one block from the gradients of one row after another."""

    def __init__(self, block: MoEBlock, frequency_E: Tensor) -> None:
        self.sources = sources(block)
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
    def listening(self) -> Iterator[None]:
        """Accumulate gradients as they arrive, and free them."""
        with ExitStack() as stack:
            for source in self.sources:
                # The hook runs inside the backward pass as soon as one parameter's gradient is
                # complete, so at no time are the gradients of all experts in memory.
                handle = source.weight.register_post_accumulate_grad_hook(self._taker(source))
                stack.callback(handle.remove)
            yield

    def _taker(self, source: Source) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            # Freed at once. It also makes the next row start from zero: squares of single rows are
            # summed, not the square of the sum.
            gradient, weight.grad = cast(Tensor, weight.grad), None
            pairs = zip(
                source.per_expert(gradient), source.per_expert(weight.detach()), strict=True
            )
            for (expert, gradient_OI), (_, weight_OI) in pairs:
                fisher_OI = self._frequency[expert] * gradient_OI.double().square()
                self._total[source.matrix] += fisher_OI
                self._weighted[source.matrix] += fisher_OI * weight_OI.double()

        return take

    def base(self) -> Matrices:
        """Return (gate, up, down) of the base expert, float64.

        Elements for which no row gave any expert a gradient are the plain mean.
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
