"""Calibration of MoE methods: the walk over the layers, and the statistics collected on it.

Calibration text passes through the model layer by layer while observers watch its MoE blocks. The
statistics are moments of micro-experts, Gram matrices of inputs, and gradients of the loss.

Shapes: B rows, L tokens per row, S tokens of one expert (or of a row), T tokens, D d_model, F an
expert's width, C inputs of a projection, N micro-experts of a layer (shared ones first), V
vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Effect, InputSize, LayerReport, MethodReport, MethodWork
from bench.models.expert_hooks import ExpertObserver, RouterWeights, observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.dense_layer import weight_of
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.micro_experts import SHARED, expert_spans, expert_view
from methods.moe.pruning import LayerEntry, MoEPruning

ObserverT = TypeVar("ObserverT", bound=ExpertObserver)


class NullObserver:
    """An observer that ignores everything; subclasses override what they need."""

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Ignore the tokens of one routed expert."""

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block's output."""


@dataclass(frozen=True)
class WalkOptions:
    """Options of a calibration walk.

    `batch` rows pass through a layer at a time, and observers get at most `chunk` tokens. With
    `sequential`, a layer that was changed runs again before the next one is measured.
    `router_weights` says which weights observers get: as the model applies them, or renormalised.
    """

    batch: int
    chunk: int
    sequential: bool = False
    router_weights: RouterWeights = "applied"


class CalibratedPruning(MoEPruning):
    """A pruning method that observes calibration text as it passes through the model.

    `batch` rows pass through a layer together, and an expert sees at most `chunk` tokens at a time;
    neither changes the result.
    """

    uses_calibration: ClassVar[bool] = True

    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the walk, and the moments of what every token's experts compute."""
        blocks = structure.micro_expert_blocks
        observed = sum(block.top_k * block.d_ff + block.d_shared for block in blocks)
        return replace(
            super().work(structure, inputs),
            observed=1.0,
            # φ² in float32: product, square, sum and maximum, each read and written.
            elements=inputs.tokens * observed * 10,
            memory=float(12 * max(block.micro_experts for block in blocks)),
        )

    def walk_options(self, *, sequential: bool = False) -> WalkOptions:
        """Return the options of a walk; by default all layers are observed unmodified."""
        return WalkOptions(self.batch, self.chunk, sequential)

    def replacement_report(
        self, structure: ModelStructure, layers: list[LayerEntry], calibration: Calibration
    ) -> MethodReport:
        """Build the report of a method that replaces experts by smaller modules.

        Every layer states its `removed_parameters`. `structure` is that of the model before, to
        which the ratios refer.
        """
        removed = sum(layer["removed_parameters"] for layer in layers)
        details = {
            "requested": {"ratio": self.ratio, "base": self.base},
            "removed_parameters": removed,
            "ratio_of_moe": removed / structure.moe_parameters,
            "ratio_of_total": removed / structure.parameters,
            "calibration": calibration.fingerprint,
            "tokens": calibration.tokens.numel(),
        }
        effect: Effect = "removed" if removed else "none"
        return MethodReport(effect, details, [LayerReport(**layer) for layer in layers])


class SequentialPruning(CalibratedPruning):
    """A calibrated method that prunes each layer as soon as it is observed.

    With `sequential` the next layer is then observed on the outputs of the pruned one, otherwise on
    those of the unpruned one.
    """

    sequential: bool = True

    def observe_blocks(
        self,
        model: Model,
        tokens_BL: Tensor,
        make_observer: Callable[[MoEBlock], ObserverT],
        progress: Progress,
    ) -> Iterator[tuple[MoEBlock, ObserverT]]:
        """Yield every block with its observer in layer order; the caller may modify the block."""
        options = self.walk_options(sequential=self.sequential)
        return walk_blocks(model, tokens_BL, make_observer, options, progress)


def walk_blocks(
    model: Model,
    tokens_BL: Tensor,
    make_observer: Callable[[MoEBlock], ObserverT],
    options: WalkOptions,
    progress: Progress,
) -> Iterator[tuple[MoEBlock, ObserverT]]:
    """Yield (block, observer) in layer order.

    The caller may modify or replace the experts of a block as soon as it is yielded. With
    `options.sequential` later blocks are observed on the outputs of the modified layer, otherwise
    on those of the unmodified one.
    """
    structure = model.structure
    blocks = structure.micro_expert_blocks
    last = blocks[-1].layer
    with LayerStream(model.network, structure.layers, tokens_BL, options.batch) as stream:
        # Layers after the last MoE block are never run: nothing is observed there.
        for index in progress.track(range(last + 1), "observing experts"):
            # Onload first: observers allocate on the device of the weights, and the weights must
            # stay there until the caller, which runs between yields, has modified them.
            stream.onload_layer(index)
            observers = {block: make_observer(block) for block in blocks if block.layer == index}
            # With `sequential` a layer runs twice: once as it was, for the observers, without
            # advancing the hidden states, and once more after the caller modified it, to produce
            # the inputs of the next layer. The last MoE layer runs once, since nothing reads its
            # output. Without `sequential` the first run already advances, so a later change cannot
            # reach the next layer.
            rerun = options.sequential and bool(observers) and index < last
            with observe_experts(observers, options.chunk, options.router_weights):
                stream.run(index, advance=not rerun)
            # The hooks are gone here, so the caller may replace whole modules. A change made after
            # the iterator was advanced past this layer's last block is not seen by the next layer.
            yield from observers.items()
            if rerun:
                stream.run(index, advance=True)


def require_finite(block: MoEBlock, *scores: Tensor) -> None:
    """Raise if a calibration statistic of a block is NaN or infinite."""
    if not all(bool(score.isfinite().all()) for score in scores):
        raise UserError(
            f"calibration produced NaN or infinite activations of {block.name}: try "
            "model.dtype=float32 or a different calibration text"
        )


Module = TypeVar("Module", bound=nn.Module)


class Activations(NullObserver):
    """Observer that sums φ² over tokens per micro-expert, φ including the router weight."""

    def __init__(self, block: MoEBlock) -> None:
        self._spans = dict(expert_spans(block))
        # The device of the first routed expert is that of all: no decoder layer is split over
        # devices.
        self._moments = Moments(block.micro_experts, expert_view(block, 0).down.device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self._moments.add(self._spans[expert], hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self._moments.add(self._spans[SHARED], hidden_TF, weight_T)

    def square_sum(self) -> Tensor:
        """Return Σ_t φ², float64 [N]."""
        return self._moments.square_sum_N


@contextmanager
def enable_gradients(network: nn.Module, weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Enable gradients for all activations and for the given weights, and for no other weight.

    On exit every weight gets its `requires_grad` back and all gradients are freed.
    """
    before = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    # With every weight frozen, nothing would require a gradient and autograd would record no graph.
    # Starting the graph at the embedding output computes no weight gradient.
    embedding: nn.Module = cast(Any, network).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for weight, requires_grad in before:
            weight.requires_grad_(requires_grad)
            weight.grad = None


def backpropagate_loss(network: nn.Module, rows_BL: Tensor) -> float:
    """Run a forward and a backward pass on some rows and return the loss.

    The loss is -Σ log p(next token) in nats, summed over all tokens, so the gradient at a token
    does not depend on how many rows or tokens share a batch.
    """
    device = cast(Any, network).get_input_embeddings().weight.device
    rows_BL = rows_BL.to(device)
    # The caller may run under no_grad.
    with torch.enable_grad():
        logits_BLV = network(input_ids=rows_BL, use_cache=False).logits
        predicted = logits_BLV[:, :-1].flatten(0, 1).float()
        # With a device map the logits may be on another device than the embeddings.
        targets = rows_BL[:, 1:].flatten().to(predicted.device)
        loss = cross_entropy(predicted, targets, reduction="sum")
        loss.backward()
    return float(loss.detach())


class InputStatistic(Protocol):
    """A statistic accumulated over the inputs of a projection."""

    def add(self, x_SC: Tensor) -> None:
        """Add some tokens."""


@contextmanager
def observe_inputs(
    statistics: Mapping[Module, InputStatistic], marked_BS: Tensor | None = None
) -> Iterator[None]:
    """Add the inputs of each module to its statistic while the context is open.

    If `marked_BS` (bool) is given, only the tokens at which it is true are added.
    """

    def before(module: Module, args: tuple[Tensor, ...]) -> None:
        # Some feed-forwards (OPT) get the tokens of all rows flattened into one dimension.
        x_SC = args[0].flatten(0, -2)
        if marked_BS is not None:
            x_SC = x_SC[marked_BS.flatten().to(x_SC.device)]
        statistics[module].add(x_SC)

    with ExitStack() as stack:
        for module in statistics:
            stack.callback(module.register_forward_pre_hook(before).remove)
        yield


@dataclass
class Gram:
    """Σ_t x_t x_tᵀ of the inputs of a projection, [C, C], and the number of tokens in the sum.

    This is the Hessian of the projection's squared error, up to a factor. float32 suffices for a
    Hessian that is damped and factorized (GPTQ, SparseGPT); least squares needs float64, since a
    Gram matrix has the squared condition number of x.
    """

    total: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Gram:
        """Return an empty sum for inputs of the given number of columns."""
        return cls(torch.zeros(columns, columns, dtype=dtype, device=device))

    @classmethod
    def of_inputs(cls, projection: nn.Module, dtype: torch.dtype = torch.float32) -> Gram:
        """Return an empty sum for the inputs of a linear layer."""
        weight_RC = weight_of(projection)
        return cls.empty(weight_RC.shape[1], weight_RC.device, dtype)

    def add(self, x_SC: Tensor) -> None:
        """Add some tokens."""
        x_SC = x_SC.to(self.total.dtype)
        self.total.addmm_(x_SC.T, x_SC)
        self.tokens += len(x_SC)

    def select(self, order_C: Tensor) -> Gram:
        """Return the rows and columns of the Gram matrix at the given indices, in their order."""
        return Gram(self.total[order_C][:, order_C], self.tokens)


class Moments:
    """Σ_t φ² and max_t φ² of N micro-experts, accumulated chunk by chunk.

    Each chunk is computed in float32 and accumulated in float64, so that neither the chunk size nor
    the model's half precision affects a ranking. Tokens not routed to an expert have φ = 0 and need
    not be added.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.square_sum_N = torch.zeros(count, dtype=torch.float64, device=device)
        self.peak_square_N = torch.zeros(count, dtype=torch.float32, device=device)

    def add(self, where: slice, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add φ = weight · hidden of the micro-experts in the slice `where`; S must not be zero."""
        square_SF = (hidden_SF.float() * weight_S.float()[:, None]).square_()
        self.square_sum_N[where] += square_SF.sum(0)
        # A slice is a view, so the maximum is written into the moments in place.
        peak_square_F = self.peak_square_N[where]
        torch.maximum(peak_square_F, square_SF.amax(0), out=peak_square_F)


def squared_column_norms(down_DF: Tensor) -> Tensor:
    """Return the squared norm ‖w_i‖₂² of every column of a down matrix, float64 [F]."""
    # Squares in float32, summed in float64: in half precision they could overflow.
    return down_DF.float().square().sum(0, dtype=torch.float64)
