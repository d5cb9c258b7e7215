"""Routing with some experts dropped, by the model's own rule.

Shapes: T tokens, E experts, K experts per token, D d_model.

The logit of a dropped expert is effectively -∞, and the model's own code does the rest, so that no
rule is reimplemented per architecture. For the kept experts this means:

* Mixtral, gpt-oss; Qwen2-MoE, Qwen3-MoE and OLMoE with `norm_topk_prob`: the K largest logits;
  softmax over these K, so weights always sum to one.
* Qwen2-MoE, OLMoE without `norm_topk_prob`; DeepSeek-MoE; DeepSeek-V2 (times its scaling factor):
  softmax over all kept experts, the K largest as they are. A dropped expert's probability is
  redistributed to the kept ones in proportion, so weights grow but need not sum to one.
* DeepSeek-V3 and similar ones: the sigmoid of each kept expert, unchanged; groups compete with
  their remaining experts; the K chosen ones are normalised if `norm_topk_prob`, then scaled.
* Phi-MoE: sparsemixer over the kept experts.

The tensors indexed by expert are in different places: the matrix of the logits in the router or in
a linear layer inside it, and a bias of the choice in the router, in a module inside it, or in the
block that calls it. `RouterParts` says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bench.errors import UserError
from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.moe_block import CHOICE_BIAS_NAMES, MoEBlock

# Number of rows on which a router is compared with its run on given logits.
SAMPLE = 8


@dataclass(frozen=True)
class RouterParts:
    """Names of the tensors of a router that are indexed by expert.

    `matrix` [E, D] computes the logits and `logit_bias` [E] is added to them. `choice_biases`, with
    last dimension E, are added to the scores by which experts are chosen. `arguments` are
    attributes of the block that it passes to its router after the hidden states; they are also
    biases of the choice.
    """

    matrix: str
    logit_bias: str | None
    choice_biases: tuple[str, ...]
    arguments: tuple[str, ...]


def router_parts(router: nn.Module, block: nn.Module | None, experts: int) -> RouterParts:
    """Find the parts of a router; without `block`, one that gets only hidden states.

    Raises:
        UserError: a part has an unknown role, so experts cannot be dropped from the router.
    """
    tensors = dict((*router.named_parameters(), *router.named_buffers()))
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    matrices = [name for name in matrices if len(tensors[name]) == experts > 1]
    if len(matrices) != 1:
        raise UserError(
            f"{type(router).__name__} has no matrix with one row for each of {experts} experts, so "
            "experts cannot be dropped from it: use state=zeroed"
        )
    (matrix,) = matrices
    beside = f"{matrix.rpartition('.')[0]}.bias".lstrip(".")
    known = {matrix, beside}
    choice = [name for name in tensors if name.rpartition(".")[2] in CHOICE_BIAS_NAMES]
    for name in tensors.keys() - known - set(choice):
        if experts in tensors[name].shape:
            raise UserError(
                f"{type(router).__name__}.{name} has a value per expert and an unknown role, so "
                "experts cannot be dropped from it: use state=zeroed"
            )
    arguments = _arguments(router, block)
    return RouterParts(matrix, beside if beside in tensors else None, tuple(choice), arguments)


def _arguments(router: nn.Module, block: nn.Module | None) -> tuple[str, ...]:
    """Return the parameters of a router's forward after the hidden states."""
    more = list(signature(router.forward).parameters.values())[1:]
    if isinstance(router, MaskedRouter) or not more:
        return ()
    for parameter in more:
        # In every architecture the block's attribute has the same name as the parameter.
        if parameter.name not in CHOICE_BIAS_NAMES or parameter.kind is Parameter.VAR_KEYWORD:
            raise UserError(
                f"{type(router).__name__} chooses experts by {parameter.name} as well, so experts "
                "cannot be dropped from it: use state=zeroed"
            )
    names = tuple(parameter.name for parameter in more)
    return tuple(name for name in names if getattr(block, name, None) is not None)


def parts_of(block: MoEBlock) -> RouterParts:
    """Return the parts of a block's router."""
    return router_parts(block.router, block.block, block.num_experts)


def call_router(block: MoEBlock, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call a block's router as the block does; return logits, weights and experts, [T, ...]."""
    return _called(block.router, x_TD, given_by(block))


def given_by(block: MoEBlock) -> tuple[Tensor, ...]:
    """Return the biases that a block passes to its router after the hidden states."""
    return tuple(getattr(block.block, name) for name in parts_of(block).arguments)


def _called(
    function: Callable[..., tuple[Tensor, ...]], x_TD: Tensor, given: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Call a router with tokens in one dimension, or in two if it requires that (AFMoE)."""
    try:
        logits, weight, index = function(x_TD, *given)
    except ValueError:
        logits, weight, index = function(x_TD[None], *given)
    return logits.flatten(0, -2), weight.flatten(0, -2), index.flatten(0, -2)


def route(
    router: nn.Module,
    logits_TE: Tensor,
    dropped: Tensor | None = None,
    given: tuple[Tensor, ...] = (),
    parts: RouterParts | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (weights [T, K], experts [T, K]) that the router's rule gives for these logits.

    The router runs with an identity instead of its matrix, so that its input are the logits; this
    needs D ≥ E. `given` are the biases that the block passes. The experts in `dropped` get a logit
    so low that their weight is exactly zero; a dropped expert may still be selected if a rule finds
    fewer than K kept ones.
    """
    experts = logits_TE.shape[1]
    parts = parts or router_parts(router, None, experts)
    d_model = _tensor(router, parts.matrix).shape[1]
    # Finite, because -inf - (-inf) in a softmax is NaN, and a quarter of the range, because
    # DeepSeek-V3 adds a bias and sums the two best scores of a group.
    low = torch.finfo(logits_TE.dtype).min / 4
    masked_TE = logits_TE if dropped is None else logits_TE.index_fill(1, dropped, low)
    dtype, device = logits_TE.dtype, logits_TE.device
    state = {parts.matrix: torch.eye(experts, d_model, dtype=dtype, device=device)}
    if parts.logit_bias is not None:
        # The given logits already include it.
        state[parts.logit_bias] = torch.zeros(experts, dtype=dtype, device=device)
    # DeepSeek-V3 selects by sigmoid(logit) + bias. A low logit gives at least 0 + bias, so a
    # dropped expert with a large bias could still be selected.
    if dropped is not None:
        for name in parts.choice_biases:
            state[name] = _tensor(router, name).detach().index_fill(-1, dropped, low)
        given = tuple(bias.detach().index_fill(-1, dropped, low) for bias in given)
    # Zero padding: identity [E, D] times the padded input reproduces the E logits exactly.
    as_input_TD = functional.pad(masked_TE, (0, d_model - experts))

    def stripped(*inputs: Tensor) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], functional_call(router, state, inputs))

    _, weight_TK, index_TK = _called(stripped, as_input_TD, given)
    return weight_TK, index_TK


def _tensor(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name."""
    owner, _, own = name.rpartition(".")
    # Not `get_parameter`, because the parameters are replaced by fake tensors to count FLOPs.
    return cast(Tensor, getattr(module.get_submodule(owner), own))


def dense_routing_weights(weight_TK: Tensor, index_TK: Tensor, experts: int) -> Tensor:
    """Scatter the weights to [T, E], with zeros for experts that are not selected."""
    weight_TE = weight_TK.new_zeros(len(weight_TK), experts)
    return weight_TE.scatter_add_(1, index_TK, weight_TK)


def check_router(block: MoEBlock) -> None:
    """Refuse a router that cannot be run on given logits; tries it with at most two tokens."""
    parts_of(block)
    if not _returns_choice(block):
        raise UserError(
            f"{type(block.block).__name__} chooses experts outside its router, so they cannot be "
            "dropped: use state=zeroed"
        )
    if block.num_experts > block.d_model:
        raise UserError(
            f"{block.name} has {block.num_experts} experts, but dropping supports at most as "
            f"many as hidden dimensions ({block.d_model}): use state=zeroed"
        )


@torch.no_grad()
def _returns_choice(block: MoEBlock) -> bool:
    """Whether a router returns logits, weights and experts."""
    matrix = _tensor(block.router, parts_of(block).matrix)
    x_TD = torch.zeros(2, block.d_model, dtype=matrix.dtype, device=matrix.device)
    for x in (x_TD, x_TD[None]):
        try:
            found = block.router(x, *given_by(block))
        except (ValueError, RuntimeError):
            continue
        return isinstance(found, tuple) and len(found) == 3
    # The meta device may lack an operation; the check is then repeated with weights.
    return True


@torch.no_grad()
def require_known_rule(block: MoEBlock) -> None:
    """Raise if a router does more than choose by the logits of its matrix and its known biases."""
    # Names and shapes do not prove what a class computes: with a norm before the matrix, or a
    # choice outside the router, results for subsets of experts would be wrong.
    parts = parts_of(block)
    matrix = _tensor(block.router, parts.matrix)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(SAMPLE, block.d_model, generator=generator)
    x_TD = x_TD.to(matrix.device, block.expert(0).down.dtype)
    try:
        logits_TE, weight_TK, index_TK = call_router(block, x_TD)
        wanted = dense_routing_weights(weight_TK, index_TK, block.num_experts).float()
        again = route(block.router, logits_TE, None, given_by(block), parts)
        got = dense_routing_weights(*again, block.num_experts).float()
        same = torch.allclose(wanted, got, rtol=1e-2, atol=1e-3)
    # Raised if the class is called differently or returns something else.
    except (ValueError, TypeError, AttributeError, RuntimeError):
        same = False
    if not same:
        raise UserError(
            f"{type(block.router).__name__} of {block.name} does not choose experts by its logits "
            "alone, so they cannot be dropped from it: use state=zeroed"
        )


@torch.no_grad()
def keep_router_rows(block: MoEBlock, kept: Sequence[int]) -> None:
    """Reduce all tensors indexed by expert, in the router and its block, to the kept experts."""
    parts = parts_of(block)
    for name, axis in _indexed(parts):
        keep_places(block.router, name, kept, axis)
    for name in parts.arguments:
        keep_places(block.block, name, kept, -1)


def _indexed(parts: RouterParts) -> Iterator[tuple[str, int]]:
    """Yield (name, axis) of the router's tensors that are indexed by expert."""
    yield parts.matrix, 0
    if parts.logit_bias is not None:
        yield parts.logit_bias, 0
    for name in parts.choice_biases:
        yield name, -1


def keep_places(module: nn.Module, name: str, kept: Sequence[int], axis: int = 0) -> None:
    """Reduce a parameter or buffer to the kept indices along an axis."""
    owner_name, _, own = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    tensor: Tensor = getattr(owner, own)
    places = torch.tensor(list(kept), device=tensor.device)
    left = tensor.detach().index_select(axis, places)
    if isinstance(tensor, nn.Parameter):
        left = nn.Parameter(left, requires_grad=tensor.requires_grad)
    setattr(owner, own, left)


class MaskedRouter(ReplacedModule):
    """A router that selects among the kept experts only and renumbers them 0, 1, 2, ...

    It keeps the weights of all E experts, for rules that depend on the index of an expert (groups);
    its block keeps the biases of all experts as well.
    """

    kept: Tensor
    dropped: Tensor
    new_names: Tensor  # a key of saved folders, which must not be renamed

    def __init__(self, router: nn.Module, kept: Sequence[int], experts: int) -> None:
        super().__init__()
        weight = next(router.parameters())
        gone = sorted(set(range(experts)) - set(kept))
        # Dropped experts get index 0: if one is selected, its weight is zero, so that any valid
        # index will do.
        new_names = [kept.index(expert) if expert in kept else 0 for expert in range(experts)]
        self.router = router
        self.experts_before = experts
        self._parts = router_parts(router, None, experts)
        for name, numbers in (("kept", kept), ("dropped", gone), ("new_names", new_names)):
            self.register_buffer(name, torch.tensor(numbers, device=weight.device))

    @property
    def top_k(self) -> int:
        """Number of experts per token."""
        return cast(int, self.router.top_k)

    def spec(self) -> ModuleSpec:
        """Return which experts are kept, and of how many."""
        return {"kept": self.kept.tolist(), "experts": self.experts_before}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Wrap a router of the published shape."""
        # Older folders do not state the number of experts; it is that of the weight's rows.
        weight = getattr(original, "weight", None)
        experts = int(spec.get("experts") or len(cast(Tensor, weight)))
        return cls(original, [int(expert) for expert in spec["kept"]], experts)

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits of the kept experts, weights [T, K], experts by their new index)."""
        logits_TE = self.router(x, *given)[0].flatten(0, -2)
        weight_TK, index_TK = route(self.router, logits_TE, self.dropped, given, self._parts)
        return logits_TE[:, self.kept], weight_TK, self.new_names[index_TK]
