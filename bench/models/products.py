"""The matrix products of a network as multiply-adds, told by whoever makes them.

A product of a row with a matrix costs as many multiply-adds as the matrix has weights; a query
meets a key twice, in q · k and in weight · v. Nothing else is counted: norms, activations,
softmax, rotations and sums are elementwise and small beside these. This is the vocabulary that
meters and methods share: a method that replaces a computation says what it multiplies instead.
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
    """Products of one kind: their part of the network, whose rows they are for, multiply-adds.

    `rows` as a part are a decoder's projections and dense feed-forwards, `attention` its quadratic
    part, `method` what a method does beside the network. `hidden` is how much of `macs` goes into
    pairs of query and key that a mask hides: work that a kernel is asked for, and may skip.
    """

    part: Part
    macs: float
    rows: Rows = "text"
    hidden: float = 0.0

    @property
    def label(self) -> str:
        """The part's name in a record: `text` and `visual` for a decoder's rows."""
        return self.rows if self.part == "rows" else self.part


def by_part(products: Iterable[Product], *, hidden: bool = True) -> dict[str, float]:
    """Return multiply-adds by part, with or without those of hidden pairs."""
    parts: dict[str, float] = {}
    for product in products:
        macs = product.macs if hidden else product.macs - product.hidden
        parts[product.label] = parts.get(product.label, 0.0) + macs
    return parts


def weights(module: nn.Module) -> int:
    """Return how many weights one row is multiplied with when it meets each matrix once.

    Embeddings are looked up, and vectors (norms, biases) are not products.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, PackedLinear):
            total += part.numel
        elif not isinstance(part, nn.Embedding):
            total += sum(w.numel() for w in part.parameters(recurse=False) if w.ndim > 1)
    return total


def projections(attention: nn.Module, count: float, past: float, rows: Rows) -> Product:
    """Return what `count` rows cost in an attention's projections when `past` keys are cached.

    Latent attention (DeepSeek) caches keys and values compressed, and expands all of them again.
    """
    again = getattr(attention, "kv_b_proj", None)
    expanded = past * weights(again) if isinstance(again, nn.Module) else 0.0
    return Product("rows", count * weights(attention) + expanded, rows)


def pair_macs(attention: nn.Module) -> int:
    """Return the multiply-adds of one query with one key and its value, over all heads.

    Raises:
        UserError: the module does not say how wide its heads are.
    """
    module = cast(Any, attention)
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if hasattr(module, "v_head_dim") and heads:  # latent attention: values of a width of their own
        return int(heads * (module.qk_head_dim + module.v_head_dim))
    if heads is None or not hasattr(module, "head_dim"):
        raise UserError(f"the heads of {type(attention).__name__} are not understood")
    return int(2 * heads * module.head_dim)


def attended(
    rows: Rows, pairs: float, seen: float, per_pair: int, part: Part = "attention"
) -> Product:
    """Return attention over so many pairs of query and key, of which `seen` are not masked."""
    return Product(part, pairs * per_pair, rows, (pairs - seen) * per_pair)


def feed_forward(module: nn.Module, count: float, rows: Rows, top_k: int | None) -> list[Product]:
    """Return what `count` rows cost in a feed-forward, dense or a mixture of experts.

    Routed experts are taken to be chosen alike: a row meets `top_k` of E, each of mean size,
    padding included. The router's part holds all that is neither routed nor shared.
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
    """Return how many weights of the experts a row meets on average."""
    told = experts.routed() if isinstance(experts, OwnModule) else None
    total = weights(experts)
    if told is not None:
        single, count = told
        return total - single + single * top_k / count
    return total * top_k / _count(experts)


def _count(experts: nn.Module) -> int:
    """Return how many routed experts there are, also those of which nothing is left."""
    widths = getattr(experts, "widths", None)
    if widths is not None:
        return len(widths)
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    return int(next(w for w in experts.parameters(recurse=False) if w.ndim > 2).shape[0])


def _top_k(block: nn.Module, fallback: int | None) -> int:
    """Return how many experts a row goes to, as a part of the block or the config says."""
    owners = (*block.children(), block)
    said = (getattr(owner, "top_k", None) for owner in owners)
    found = next((value for value in said if isinstance(value, int)), fallback)
    if found is None:
        raise UserError(f"{type(block).__name__} does not say how many experts a token goes to")
    return found


def matrices(*tensors: Tensor) -> int:
    """Return how many weights some matrices have together."""
    return sum(tensor.numel() for tensor in tensors)
