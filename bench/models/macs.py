"""MACs of a network's matmuls, and the protocol with which methods report theirs.

Multiplying a row by a matrix takes as many multiply-adds (MACs) as the matrix has weights. A query
meets each key twice, in q · k and in weight · v. Norms, activations, softmax, rotations and sums
are not counted, because they are elementwise and small in comparison. Measurements and methods use
the same types: a method that replaces a computation reports its own matmuls.

A method that reduces the decoder's work stores a `FlopsProvider` on the network, next to the
forward that it replaces. It is called when costs are measured and therefore covers changes by later
methods, which the report of a method cannot. It is also copied with the network, unlike a report or
a field of `Model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from bench.data.chat import ModelInputs
from bench.errors import UserError
from bench.models.bitpacking.packed_modules import PackedExperts, PackedLinear
from bench.models.replaced_modules import ReplacedModule
from bench.models.structure.dense_layer import find_heads, shape_of
from bench.models.structure.moe_block import SHARED_NAMES
from bench.models.structure.ragged_experts import RaggedExperts

NetworkPart = Literal[
    "vision", "projector", "rows", "attention", "routed", "shared", "router", "head", "method",
    "convolution", "dense",
]  # fmt: skip
TokenKind = Literal["text", "visual"]


@dataclass(frozen=True)
class MatmulCost:
    """MACs of matmuls of one kind: part of the network, kind of tokens, number.

    The part `rows` are a decoder's projections and dense feed-forwards, `attention` is its
    quadratic part, and `method` is what a method computes in addition to the network. `masked` is
    the share of `macs` for pairs of query and key that a mask hides; a kernel gets these pairs, but
    may skip them.
    """

    part: NetworkPart
    macs: float
    tokens: TokenKind = "text"
    masked: float = 0.0

    @property
    def label(self) -> str:
        """Name of the part in records: `text` and `visual` for a decoder's rows."""
        return self.tokens if self.part == "rows" else self.part


def macs_by_part(products: Iterable[MatmulCost], *, masked: bool = True) -> dict[str, float]:
    """Return the sum of MACs per part, with or without those of masked pairs."""
    parts: dict[str, float] = {}
    for product in products:
        macs = product.macs if masked else product.macs - product.masked
        parts[product.label] = parts.get(product.label, 0.0) + macs
    return parts


def matrix_weights(module: nn.Module) -> int:
    """Count the weights that one row is multiplied by when it passes each matrix once.

    Embeddings do not count, because they are looked up, and neither do vectors (norms, biases).
    """
    total = 0
    for part in module.modules():
        # Packed layers store codes in buffers; `numel` is the number of weights, not of bytes.
        if isinstance(part, PackedLinear):
            total += part.numel
        elif not isinstance(part, nn.Embedding):
            total += sum(w.numel() for w in part.parameters(recurse=False) if w.ndim > 1)
    return total


def projection_cost(
    attention: nn.Module, count: float, past: float, tokens: TokenKind
) -> MatmulCost:
    """Return the cost of `count` rows in attention projections, with `past` keys cached."""
    # Latent attention (DeepSeek) caches compressed keys and values, and expands all of them in
    # every call.
    again = getattr(attention, "kv_b_proj", None)
    expanded = past * matrix_weights(again) if isinstance(again, nn.Module) else 0.0
    return MatmulCost("rows", count * matrix_weights(attention) + expanded, tokens)


class _HeadWidths(Protocol):
    """Widths of heads as an attention module states them: one, or separate ones for values."""

    head_dim: int
    qk_head_dim: int
    v_head_dim: int


def macs_per_pair(attention: nn.Module) -> int:
    """Return the MACs for one query with one key and its value, over all heads.

    Raises:
        UserError: the module does not state the width of its heads.
    """
    module = cast(_HeadWidths, attention)
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    if hasattr(module, "v_head_dim") and heads:  # Latent attention has a separate value width.
        return int(heads * (module.qk_head_dim + module.v_head_dim))
    if heads is None or not hasattr(module, "head_dim"):
        raise UserError(
            f"{type(attention).__name__} does not state the number and width of its heads"
        )
    found = find_heads(attention)
    if len(found) == 1:
        # A config has one number for all layers, but layers may have lost different heads.
        return 2 * shape_of(found[0].readout)[1]
    return int(2 * heads * module.head_dim)


def attention_cost(
    tokens: TokenKind, pairs: float, seen: float, per_pair: int, part: NetworkPart = "attention"
) -> MatmulCost:
    """Return the cost of attention over `pairs` of query and key, of which `seen` are unmasked."""
    return MatmulCost(part, pairs * per_pair, tokens, (pairs - seen) * per_pair)


def feed_forward_costs(
    module: nn.Module, count: float, tokens: TokenKind, top_k: int | None
) -> list[MatmulCost]:
    """Return the cost of `count` rows in a feed-forward, dense or a mixture of experts.

    Routing is assumed to be balanced: a row uses `top_k` of E experts of the mean size, including
    padding. The `router` part contains everything that is neither routed nor shared.
    """
    experts = getattr(module, "experts", None)
    if not isinstance(experts, nn.Module):
        return [MatmulCost("rows", count * matrix_weights(module), tokens)]
    shared = sum(
        matrix_weights(part) for name, part in module.named_children() if name in SHARED_NAMES
    )
    rest = matrix_weights(module) - matrix_weights(experts) - shared
    routed = _weights_per_token(experts, _top_k(module, top_k))
    parts: dict[NetworkPart, float] = {"routed": routed, "shared": shared, "router": rest}
    return [MatmulCost(part, count * macs, tokens) for part, macs in parts.items() if macs]


def _weights_per_token(experts: nn.Module, top_k: int) -> float:
    """Return the mean number of expert weights that a row is multiplied by."""
    # Replaced experts may have weights that every token uses (a shared base of D2-MoE), so only
    # the weights of single experts are scaled by top_k / E.
    own = experts.routed_parameters() if isinstance(experts, ReplacedModule) else None
    total = matrix_weights(experts)
    if own is not None:
        single, count = own
        return total - single + single * top_k / count
    return total * top_k / _num_experts(experts)


def _num_experts(experts: nn.Module) -> int:
    """Return the number of routed experts, including those of width 0."""
    widths = getattr(experts, "widths", None)
    if widths is not None:
        return len(widths)
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    stated = getattr(experts, "num_experts", None)
    if isinstance(stated, int):
        return stated
    # Fused experts are stored in one 3-D parameter, experts first.
    return int(next(w for w in experts.parameters(recurse=False) if w.ndim > 2).shape[0])


def number_of_unlike_experts(experts: nn.Module) -> int | None:
    """Return the number of experts in a module of slimbench, None for other modules.

    Methods that leave experts of different sizes use such modules. Equal experts of a published
    network stay in its own modules.
    """
    if isinstance(experts, PackedExperts):
        return len(experts)
    if isinstance(experts, RaggedExperts):
        return len(experts.widths)
    own = experts.routed_parameters() if isinstance(experts, ReplacedModule) else None
    return None if own is None else own[1]


def _top_k(block: nn.Module, fallback: int | None) -> int:
    """Return the number of experts per row, from the block, its parts, or else the config."""
    values = (getattr(owner, "top_k", None) for owner in (*block.children(), block))
    found = next((value for value in values if isinstance(value, int)), fallback)
    if found is None:
        raise UserError(
            f"{type(block).__name__} does not state how many experts a token goes to (top_k)"
        )
    return found


def total_numel(*tensors: Tensor) -> int:
    """Return the total number of elements of some tensors."""
    return sum(tensor.numel() for tensor in tensors)


# A plain attribute of the module, so that `copy.deepcopy` copies it with the network.
FLOPS_PROVIDER_ATTRIBUTE = "slimbench_plan"


@dataclass(frozen=True)
class VisualLayer:
    """One layer as papers describe it: number of visual tokens, shares of heads and neurons in use.

    `windowed` is true if visual tokens attend only to neighbours.
    """

    tokens: int
    heads: float = 1.0
    neurons: float = 1.0
    windowed: bool = False


@runtime_checkable
class FlopsProvider(Protocol):
    """Counts of a decoder's work; inputs are a prompt's, as returned by the processor."""

    @property
    def unaccounted(self) -> tuple[str, ...]:
        """Return the methods whose own matmuls are not counted."""

    def prefill(self, inputs: ModelInputs) -> list[MatmulCost] | None:
        """Return the decoder's matmuls for a prompt, or None if they are those of the dense model.

        The head does not belong to the decoder, and neither do vision tower and projector, except
        for what a method makes them compute again.
        """

    def token(self, inputs: ModelInputs) -> list[MatmulCost] | None:
        """Like `prefill`, for the first token that is generated after the prompt."""

    def layers(self, inputs: ModelInputs) -> list[VisualLayer]:
        """Return every layer of the decoder as papers describe it."""

    def tower_rows(self, inputs: ModelInputs) -> tuple[int, ...] | None:
        """Return the number of rows per image in each layer of the vision tower.

        The class token counts. The patches of the last layer are the input of the projector.
        Return None if the numbers are those of the dense model.
        """


def flops_provider_of(network: nn.Module) -> FlopsProvider | None:
    """Return the FLOPs provider that a method stored on a network, if any."""
    found = getattr(network, FLOPS_PROVIDER_ATTRIBUTE, None)
    return found if isinstance(found, FlopsProvider) else None
