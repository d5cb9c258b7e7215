"""NAEE (arXiv 2402.14800): drop the experts whose removal changes a block's output least.

Shapes: B rows, L tokens per row, P of them kept, D d_model.

`block_error` has the error of a block without a subset of its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.method import Context, InputSize, MethodReport, MethodWork, WeightForm
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.baselines.expert_removal import ExpertState, RemovedExperts, WholeExpertPruning
from methods.baselines.naee.block_error import BlockErrorModel
from methods.moe.pruning import (
    LayerEntry,
    refuse_offloaded,
    require_calibration,
    require_equal_widths,
)


@dataclass(frozen=True)
class BlockIO:
    """Inputs and outputs of a block for some tokens of every row."""

    x_BPD: Tensor
    y_BPD: Tensor


def block_error_models(
    model: Model,
    tokens_BL: Tensor,
    batch: int,
    *,
    progressive: bool,
    kept: int,
    state: ExpertState,
    progress: Progress,
) -> Iterator[tuple[MoEBlock, BlockErrorModel]]:
    """Yield the error model of every block in layer order; the caller may modify the block.

    `kept` tokens of each row are used, evenly spaced. With `progressive` inputs come from the
    already pruned earlier layers, while the target is still the output of the unpruned model, for
    which a second set of hidden states is advanced in parallel.
    """
    structure = model.structure
    last = structure.moe[-1].layer
    with ExitStack() as stack:
        stream, *reference = (
            stack.enter_context(LayerStream(model.network, structure.layers, tokens_BL, batch))
            for _ in range(2 if progressive else 1)
        )
        for index in progress.track(range(last + 1), "searching for experts to drop"):
            blocks = [block for block in structure.moe if block.layer == index]
            # As in the calibration walk, the layer runs again after pruning unless it is the last.
            rerun = progressive and bool(blocks) and index < last
            # Both streams share the network, so the reference stream must advance here, before the
            # caller prunes the layer.
            targets: dict[MoEBlock, BlockIO] = {}
            for other in reference:
                targets = _run_layer(other, index, blocks, kept, advance=True)
            recorded = _run_layer(stream, index, blocks, kept, advance=not rerun)
            for block in blocks:
                own = recorded[block]
                target_BPD = targets.get(block, own).y_BPD
                yield block, BlockErrorModel(block, own.x_BPD, own.y_BPD, target_BPD, state)
            if rerun:
                stream.run(index, advance=True)


def _run_layer(
    stream: LayerStream, index: int, blocks: list[MoEBlock], kept: int, *, advance: bool
) -> dict[MoEBlock, BlockIO]:
    """Run all rows through a layer; return the inputs and outputs of its blocks."""
    with _record_block_io(blocks, kept) as recorded:
        stream.run(index, advance=advance)
    return {block: _concatenate(pieces) for block, pieces in recorded.items()}


def _concatenate(pieces: list[BlockIO]) -> BlockIO:
    x, y = ([getattr(piece, name) for piece in pieces] for name in ("x_BPD", "y_BPD"))
    return BlockIO(torch.cat(x), torch.cat(y))


@contextmanager
def _record_block_io(blocks: list[MoEBlock], kept: int) -> Iterator[dict[MoEBlock, list[BlockIO]]]:
    """Record evenly spaced tokens at the input and output of some blocks."""
    recorded: dict[MoEBlock, list[BlockIO]] = {block: [] for block in blocks}
    entered: dict[MoEBlock, Tensor] = {}

    def evenly_spaced(state_BLD: Tensor) -> Tensor:
        length = state_BLD.shape[1]
        # Integer arithmetic: evenly spaced, distinct, and the same on every device.
        place_P = torch.arange(kept, device=state_BLD.device) * length // kept
        return state_BLD[:, place_P] if kept < length else state_BLD

    with ExitStack() as stack:
        for block in blocks:
            # `block=block` binds the current block; a closure would see the last one of the loop.
            def enter(_: nn.Module, args: tuple[Tensor, ...], block: MoEBlock = block) -> None:
                entered[block] = evenly_spaced(args[0])

            def leave(
                _: nn.Module,
                __: object,
                output: Tensor | tuple[Tensor, ...],
                block: MoEBlock = block,
            ) -> None:
                # Some blocks return their router's logits as well.
                y_BLD = output[0] if isinstance(output, tuple) else output
                recorded[block].append(BlockIO(entered.pop(block), evenly_spaced(y_BLD)))

            stack.callback(block.block.register_forward_pre_hook(enter).remove)
            stack.callback(block.block.register_forward_hook(leave).remove)
        yield recorded


class Naee(WholeExpertPruning):
    """Drop the routed experts whose removal changes the output of each block least.

    As published, every subset is tried. If there are more than `exhaustive_limit`, greedy
    elimination is used instead, which the report states. With `progressive`, a layer is searched on
    the outputs of the pruned layers before it, against the unpruned model's output. The search uses
    about `tokens` calibration tokens, evenly spaced in all rows (the paper uses all); errors are
    summed over rows. With `state=zeroed`, the search assumes that tokens are not rerouted.
    """

    uses_calibration: ClassVar[bool] = True
    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain"})

    state: ExpertState = "dropped"
    progressive: bool = True
    exhaustive_limit: int = Field(default=20_000, ge=1)
    tokens: int = Field(default=2048, ge=1)
    batch: int = Field(default=8, ge=1)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse experts of different widths: subsets would differ in size."""
        super().check(structure)
        require_equal_widths(structure.moe, "NAEE")

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the passes, what every expert makes of the kept tokens, and the subsets' errors.

        Inner products are taken in float64, which counts twice: 2·E·D with the target and 2·E²·D
        among the experts per token. A subset costs its squared error at each token.
        """
        kept = min(self.tokens, inputs.tokens)
        flops, elements = 0.0, 0.0
        for block, budget in zip(structure.moe, self.budgets(structure), strict=True):
            experts, count = block.num_experts, budget // block.d_ff
            flops += kept * experts * 6 * block.d_model * block.d_ff
            flops += 2 * kept * (2 * experts + 2 * experts**2) * block.d_model
            elements += kept * subsets_tried(experts, count, self.exhaustive_limit)
        # Of the unpruned model, and on the way that is being pruned, where each layer runs again.
        passes = 3.0 if self.progressive else 1.0
        return MethodWork(forwards=passes, flops=flops, elements=elements)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Search and drop, block by block; the report says how each block was searched."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.moe)
        rows, length = calibration.tokens.shape
        # At least one token per row: every row is a term of the error.
        kept = min(length, max(1, self.tokens // rows))
        found = block_error_models(
            model,
            calibration.tokens,
            self.batch,
            progressive=self.progressive,
            kept=kept,
            state=self.state,
            progress=context.progress,
        )
        layers = []
        for (block, error_model), budget in zip(found, self.budgets(structure), strict=True):
            chosen, search_report = self._choose(block, error_model, budget)
            layers.append(
                self.remove_experts(block, chosen, structure, context.seed) | search_report
            )
        return self.build_report(
            model,
            structure,
            layers,
            progressive=self.progressive,
            calibration=calibration.fingerprint,
            tokens=rows * kept,
        )

    def _choose(
        self, block: MoEBlock, error_model: BlockErrorModel, budget: int
    ) -> tuple[RemovedExperts, LayerEntry]:
        """Return what a block loses. A partial expert is the one that would be dropped next."""
        count, partial_count = divmod(budget, block.d_ff)
        found = search_subset(block.num_experts, count, error_model.errors, self.exhaustive_limit)
        partial_expert = None
        if partial_count:
            partial_expert, _ = next_expert_to_drop(
                block.num_experts, found.dropped, error_model.errors
            )
        report = {"search": found.strategy, "subsets_tried": found.tried, "error": found.error}
        return RemovedExperts(found.dropped, partial_expert, partial_count), report


ErrorFunction = Callable[[Sequence[tuple[int, ...]]], list[float]]
"""Maps sets of experts to the errors of a block without them."""


@dataclass(frozen=True)
class ExpertSubset:
    """Experts to drop, the error without them, and the number of subsets tried."""

    dropped: tuple[int, ...]
    error: float
    strategy: Literal["exhaustive", "greedy"]
    tried: int


def subsets_tried(experts: int, count: int, limit: int) -> int:
    """Return how many subsets `search_subset` tries."""
    every = math.comb(experts, count)
    return every if every <= limit else count * (2 * experts - count + 1) // 2


def search_subset(experts: int, count: int, errors_of: ErrorFunction, limit: int) -> ExpertSubset:
    """Return `count` of `experts` experts to drop.

    If there are at most `limit` subsets, all are tried, as in NAEE. Otherwise greedy elimination,
    which is not in the paper: the expert whose removal adds the least error is removed first, then
    the next one given the first, and so on; count · (experts - (count - 1) / 2) subsets are tried.
    Ties go to the first candidate in both.
    """
    if math.comb(experts, count) <= limit:
        subsets = list(combinations(range(experts), count))
        errors = errors_of(subsets)
        best = min(range(len(subsets)), key=errors.__getitem__)
        return ExpertSubset(subsets[best], errors[best], "exhaustive", len(subsets))
    dropped: tuple[int, ...] = ()
    lowest, tried = math.inf, 0
    for _ in range(count):
        expert, lowest = next_expert_to_drop(experts, dropped, errors_of)
        tried += experts - len(dropped)
        dropped = (*dropped, expert)
    return ExpertSubset(tuple(sorted(dropped)), lowest, "greedy", tried)


def next_expert_to_drop(
    experts: int, dropped: tuple[int, ...], errors_of: ErrorFunction
) -> tuple[int, float]:
    """Return the expert whose removal on top of `dropped` adds the least error, and that error."""
    left = [expert for expert in range(experts) if expert not in dropped]
    errors = errors_of([(*dropped, expert) for expert in left])
    best = min(range(len(left)), key=errors.__getitem__)
    return left[best], errors[best]
