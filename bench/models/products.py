"""MACs of a network's matmuls, reported by the component that performs them.

Multiplying a row with a matrix costs as many multiply-adds (MACs) as the matrix has weights; a
query meets each key twice, in q · k and in weight · v. Nothing else is counted: norms, activations,
softmax, rotations and sums are elementwise and small in comparison. Measurements and methods share
this vocabulary: a method that replaces a computation reports its matmuls instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.anatomy.understanding import SHARED
from bench.models.own import OwnModule
from bench.models.packed import PackedLinear

Part = Literal[
    "vision", "projector", "rows", "attention", "routed", "shared", "router", "head", "method",
    "convolution", "dense",
]  # fmt: skip
Rows = Literal["text", "visual"]


@dataclass(frozen=True)
class Product:
    """Cost of matmuls of one kind: part of the network, kind of tokens, MACs.

    `rows` as a part are a decoder's projections and dense feed-forwards, `attention` is its
    quadratic part, `method` is what a method computes in addition to the network. `hidden` is the
    share of `macs` for pairs of query and key that a mask hides: a kernel is asked for them, but
    may skip them.
    """

    part: Part
    macs: float
    rows: Rows = "text"
    hidden: float = 0.0

    @property
    def label(self) -> str:
        """Name of the part in a record: `text` and `visual` for a decoder's rows."""
        return self.rows if self.part == "rows" else self.part


def by_part(products: Iterable[Product], *, hidden: bool = True) -> dict[str, float]:
    """Sum MACs by part, with or without those of masked pairs."""
    parts: dict[str, float] = {}
    for product in products:
        macs = product.macs if hidden else product.macs - product.hidden
        parts[product.label] = parts.get(product.label, 0.0) + macs
    return parts


def weights(module: nn.Module) -> int:
    """Count the weights that one row is multiplied with when it passes each matrix once.

    Embeddings are looked up, and vectors (norms, biases) are no matmuls.
    """
    total = 0
    for part in module.modules():
        # Packed layers hold codes in buffers: `numel` is the number of weights, not of bytes.
        if isinstance(part, PackedLinear):
            total += part.numel
        elif not isinstance(part, nn.Embedding):
            total += sum(w.numel() for w in part.parameters(recurse=False) if w.ndim > 1)
    return total


def projections(attention: nn.Module, count: float, past: float, rows: Rows) -> Product:
    """Compute the cost of `count` rows in attention projections, with `past` keys cached."""
    # Latent attention (DeepSeek) caches keys and values compressed and expands all of them again in
    # every call, cached ones included.
    again = getattr(attention, "kv_b_proj", None)
    expanded = past * weights(again) if isinstance(again, nn.Module) else 0.0
    return Product("rows", count * weights(attention) + expanded, rows)


def pair_macs(attention: nn.Module) -> int:
    """Return the MACs of one query with one key and its value, over all heads.

    Raises:
        UserError: the module does not state the width of its heads.
    """
    module = cast(Any, attention)
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if hasattr(module, "v_head_dim") and heads:  # latent attention: values have their own width
        return int(heads * (module.qk_head_dim + module.v_head_dim))
    if heads is None or not hasattr(module, "head_dim"):
        raise UserError(
            f"{type(attention).__name__} does not state the number and width of its heads"
        )
    return int(2 * heads * module.head_dim)


def attended(
    rows: Rows, pairs: float, seen: float, per_pair: int, part: Part = "attention"
) -> Product:
    """Compute the cost of attention over `pairs` of query and key, `seen` of them not masked."""
    return Product(part, pairs * per_pair, rows, (pairs - seen) * per_pair)


def feed_forward(module: nn.Module, count: float, rows: Rows, top_k: int | None) -> list[Product]:
    """Compute the cost of `count` rows in a feed-forward, dense or mixture of experts.

    Routing is assumed to be even: a row meets `top_k` of E experts, each of mean size, padding
    included. The router's part holds everything that is neither routed nor shared.
    """
    experts = getattr(module, "experts", None)
    if not isinstance(experts, nn.Module):
        return [Product("rows", count * weights(module), rows)]
    shared = sum(weights(part) for name, part in module.named_children() if name in SHARED)
    rest = weights(module) - weights(experts) - shared
    routed = _met(experts, _top_k(module, top_k))
    parts: dict[Part, float] = {"routed": routed, "shared": shared, "router": rest}
    return [Product(part, count * macs, rows) for part, macs in parts.items() if macs]


def _met(experts: nn.Module, top_k: int) -> float:
    """Return the mean number of expert weights that a row is multiplied with."""
    # Replaced experts may hold weights that every token meets (a shared base of D2-MoE), so only
    # the part that belongs to single experts is scaled by top_k / E.
    told = experts.routed() if isinstance(experts, OwnModule) else None
    total = weights(experts)
    if told is not None:
        single, count = told
        return total - single + single * top_k / count
    return total * top_k / _count(experts)


def _count(experts: nn.Module) -> int:
    """Return the number of routed experts, including those of width 0."""
    widths = getattr(experts, "widths", None)
    if widths is not None:
        return len(widths)
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    # Fused experts store all experts in one 3-D parameter, experts first.
    return int(next(w for w in experts.parameters(recurse=False) if w.ndim > 2).shape[0])


def _top_k(block: nn.Module, fallback: int | None) -> int:
    """Return the number of experts per row, from the block, its parts, or the config's value."""
    owners = (*block.children(), block)
    said = (getattr(owner, "top_k", None) for owner in owners)
    found = next((value for value in said if isinstance(value, int)), fallback)
    if found is None:
        raise UserError(
            f"{type(block).__name__} does not state how many experts a token goes to (top_k)"
        )
    return found


def matrices(*tensors: Tensor) -> int:
    """Count the weights of some matrices together."""
    return sum(tensor.numel() for tensor in tensors)
