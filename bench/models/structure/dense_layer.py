"""Feed-forward and attention heads of a decoder layer, for all supported naming schemes.

Shapes: D d_model, F the feed-forward's width, R rows (outputs), C columns (inputs), KEPT the
micro-experts that are kept.

A feed-forward has one of three forms: gated, y = Wdown (act(Wgate x) ⊙ Wup x); fused, the same
with the rows of gate and up in one matrix (Phi-3); plain, y = Wdown act(Wup x), without a gate. All
may have biases. GPT-2 stores its matrices transposed (`Conv1D`), and in OPT the matrices are
attributes of the decoder layer itself.

Queries, keys and values have separate matrices or share one, whose rows are ordered by role
(Phi-3, GPT-2) or by head group (GPT-NeoX, Falcon).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from bench.models.network import text_config
from bench.models.structure.expert_view import (
    ACTIVATION_NAMES,
    Activation,
    ExpertForm,
    ExpertView,
    gated_projections,
)

# Names of (up, down) in plain feed-forwards: GPT-2 and StarCoder2; OPT and Phi; NeoX and Falcon;
# Nemotron.
PLAIN_NAMES = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)
# Names of (fused gate and up, down): Phi-3; Granite.
FUSED_NAMES = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))

# Fields of configs with the width of all feed-forward layers.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def is_projection(module: object) -> TypeGuard[nn.Module]:
    """Return whether a module is a linear layer, stored as usual or transposed."""
    # Imported here, because classifiers are inspected without transformers.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(projection: nn.Module) -> bool:
    """Return whether a projection stores its weight as [C, R] (GPT-2's `Conv1D`)."""
    return not isinstance(projection, nn.Linear)


def weight_of(projection: nn.Module) -> Tensor:
    """Return the weight [R, C] of a projection as a view, so that writes change the module."""
    weight = cast(Tensor, projection.weight).detach()
    return weight.T if is_transposed(projection) else weight


def bias_of(projection: nn.Module) -> Tensor | None:
    """Return the bias [R] of a projection as a view, or None."""
    bias = cast("Tensor | None", projection.bias)
    return None if bias is None else bias.detach()


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """Return rows and columns without reading the weight, which may be packed."""
    if isinstance(projection, nn.Linear):
        return projection.out_features, projection.in_features
    return cast(int, projection.nf), cast(int, projection.nx)


@torch.no_grad()
def assign_weight(projection: Any, weight_RC: Tensor, bias_R: Tensor | None) -> None:
    """Give a projection a weight and a bias of other sizes, and update its own size fields."""
    stored = weight_RC.T if is_transposed(projection) else weight_RC
    # Cloned, because the argument may be a view of the old weight, which is to be freed.
    projection.weight = nn.Parameter(stored.contiguous().clone(), requires_grad=False)
    if bias_R is not None:
        projection.bias = nn.Parameter(bias_R.clone(), requires_grad=False)
    rows, columns = weight_RC.shape
    if is_transposed(projection):
        projection.nf, projection.nx = rows, columns
    else:
        projection.out_features, projection.in_features = rows, columns


@dataclass(frozen=True)
class FeedForward:
    """Location of a feed-forward's matrices: names of attributes of `owner`, in order.

    `inputs` names gate and up, a fused matrix of both, or only up.
    """

    owner: nn.Module
    inputs: tuple[str, ...]
    output: str
    form: ExpertForm
    act: Activation

    @property
    def sources(self) -> tuple[nn.Module, ...]:
        """Projections whose rows are micro-experts."""
        return tuple(cast(nn.Module, getattr(self.owner, name)) for name in self.inputs)

    @property
    def down(self) -> nn.Module:
        """Projection whose columns are micro-experts."""
        return cast(nn.Module, getattr(self.owner, self.output))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """All projections in order of execution."""
        return (*self.sources, self.down)

    @property
    def width(self) -> int:
        """Number of micro-experts."""
        return shape_of(self.down)[1]

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return shape_of(self.down)[0]

    @property
    def biases(self) -> int:
        """Number of biases of one micro-expert; the bias of down belongs to none."""
        parts = 2 if self.form == "fused" else 1
        return sum(parts for source in self.sources if source.bias is not None)

    def view(self) -> ExpertView:
        """View the layer as an expert; writing to it changes the network."""
        weights = [weight_of(source) for source in self.sources]
        biases = [bias_of(source) for source in self.sources]
        if self.form == "fused":
            weights = list(weights[0].chunk(2))
            biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
        elif self.form == "plain":
            weights, biases = [weights[0][:0], weights[0]], [None, biases[0]]
        return ExpertView(
            weights[0],
            weights[1],
            weight_of(self.down),
            self.act,
            form=self.form,
            gate_bias=biases[0],
            up_bias=biases[1],
            down_bias=bias_of(self.down),
        )

    def narrow(self, kept: Tensor) -> None:
        """Keep only the micro-experts `kept` [KEPT], in ascending order, and free the others."""
        view = self.view()
        kept = kept.to(view.down.device)
        weights, biases = view.input_matrices(kept), view.input_biases(kept)
        for source, weight_RC, bias_R in zip(self.sources, weights, biases, strict=True):
            assign_weight(source, weight_RC, bias_R)
        assign_weight(self.down, view.down[:, kept], view.down_bias)

    def replace(self, sources: Sequence[nn.Module], down: nn.Module) -> None:
        """Replace the projections."""
        for name, module in zip((*self.inputs, self.output), (*sources, down), strict=True):
            setattr(self.owner, name, module)


def feed_forwards(layer: nn.Module) -> list[FeedForward]:
    """Return every feed-forward layer of a known form in a module, including itself."""
    found = (_feed_forward(module) for module in layer.modules())
    return [part for part in found if part is not None]


def _feed_forward(owner: nn.Module) -> FeedForward | None:
    act = next((a for n in ACTIVATION_NAMES if callable(a := getattr(owner, n, None))), None)
    if act is None:
        return None
    gated = gated_projections(owner)
    if gated is not None:
        names = tuple(n for part in gated for n, own in owner.named_children() if own is part)
        return FeedForward(owner, names[:2], names[2], "gated", act)
    pairs: tuple[tuple[str, str, ExpertForm], ...] = (
        *((*names, "fused") for names in FUSED_NAMES),
        *((*names, "plain") for names in PLAIN_NAMES),
    )
    for up_name, down_name, form in pairs:
        up, down = getattr(owner, up_name, None), getattr(owner, down_name, None)
        if is_projection(up) and is_projection(down):
            rows, width = shape_of(up)[0], shape_of(down)[1]
            if rows == (2 * width if form == "fused" else width):
                return FeedForward(owner, (up_name,), down_name, form, act)
    return None


_RowOrder = Literal["by role", "by group"]
"""Order of the rows of a fused matrix: all queries, all keys, all values; or group by group."""
FUSED_ATTENTION: dict[str, tuple[str, str, _RowOrder]] = {
    "Phi3Attention": ("qkv_proj", "o_proj", "by role"),
    "GPT2Attention": ("c_attn", "c_proj", "by role"),
    "GPTNeoXAttention": ("query_key_value", "dense", "by group"),
    "FalconAttention": ("query_key_value", "dense", "by group"),
}
"""Fused matrix, output matrix and order of the rows by class.

Keyed by class, because names do not determine the order: GPT-BigCode has GPT-2's names, but its
rows are ordered by head.
"""
SEPARATE_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)


@dataclass(frozen=True)
class Heads:
    """Head groups of an attention module: a key-value head with its query heads.

    `inputs` names the matrices of queries, keys and values, or one for all of them; `group_rows`
    has the group of each of their rows, [R] each. A group has `queries` consecutive columns of the
    output matrix. `refusal` says why the module does not allow removing a group, or is None.
    """

    owner: nn.Module
    inputs: tuple[str, ...]
    output: str
    groups: int
    head_dim: int
    queries: int
    group_rows: tuple[Tensor, ...]
    refusal: str | None = None

    @property
    def sources(self) -> tuple[nn.Module, ...]:
        """Projections whose rows belong to groups."""
        return tuple(cast(nn.Module, getattr(self.owner, name)) for name in self.inputs)

    @property
    def readout(self) -> nn.Module:
        """Projection whose columns belong to groups."""
        return cast(nn.Module, getattr(self.owner, self.output))

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values share a matrix."""
        return len(self.inputs) == 1

    @property
    def reason_to_stay(self) -> str | None:
        """Why no group can be removed, as a clause about the attention; None if one can."""
        if self.groups == 1:
            return "has one key-value head for all queries"
        return self.refusal


def find_heads(module: nn.Module) -> list[Heads]:
    """Return the heads of every attention of a known layout in a module, including itself."""
    found = (_heads(owner) for owner in module.modules())
    return [heads for heads in found if heads is not None]


def _heads(owner: Any) -> Heads | None:  # attributes depend on the architecture
    for names in SEPARATE_NAMES:
        if hasattr(owner, "head_dim") and _has_projections(owner, names):
            return _separate_heads(owner, names)
    layout = FUSED_ATTENTION.get(type(owner).__name__)
    if layout is not None and _has_projections(owner, layout[:2]):
        return _fused_heads(owner, *layout)
    return None


def _has_projections(owner: nn.Module, names: Sequence[str]) -> bool:
    return all(is_projection(getattr(owner, name, None)) for name in names)


def _separate_heads(owner: Any, names: tuple[str, ...]) -> Heads:
    *inputs, output = names
    head_dim = int(owner.head_dim)
    groups = shape_of(getattr(owner, inputs[1]))[0] // head_dim
    # Query heads of a key-value head are consecutive, as transformers' `repeat_kv` pairs them.
    queries = shape_of(getattr(owner, inputs[0]))[0] // groups
    group_G = torch.arange(groups)
    rows = tuple(group_G.repeat_interleave(each) for each in (queries, head_dim, head_dim))
    norm = getattr(getattr(owner, "q_norm", None), "weight", None)
    together = norm is not None and norm.numel() != head_dim  # OLMo 2
    refusal = "normalises the queries of all heads together" if together else None
    return Heads(owner, tuple(inputs), output, groups, head_dim, queries, rows, refusal)


def _fused_heads(owner: Any, fused: str, output: str, order: _RowOrder) -> Heads | None:
    head_dim = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None)
    if head_dim is None:
        return None
    width, total = shape_of(getattr(owner, output))[1], shape_of(getattr(owner, fused))[0]
    # Rows that are not queries are half keys, half values. GPT-2's cross-attention has no queries.
    groups = (total - width) // (2 * head_dim)
    if groups < 1 or total != width + 2 * groups * head_dim or width % groups:
        return None
    group_G, queries = torch.arange(groups), width // groups
    if order == "by group":
        group_R = group_G.repeat_interleave(queries + 2 * head_dim)
    else:
        roles = (queries, head_dim, head_dim)
        group_R = torch.cat([group_G.repeat_interleave(rows) for rows in roles])
    alibi = getattr(getattr(owner, "config", None), "alibi", False)  # Falcon
    refusal = "gives each head a slope (ALiBi) that depends on their number" if alibi else None
    return Heads(owner, (fused,), output, groups, head_dim, queries, (group_R,), refusal)


def state_head_groups(heads: Heads, left: int) -> None:
    """Make an attention module split its states into `left` head groups.

    Modules that derive the number from the width of their states need no change.
    """
    owner: Any = heads.owner
    counts = {"num_heads": left * (heads.queries // heads.head_dim), "num_kv_heads": left}
    counts |= {"num_key_value_heads": left, "split_size": left * heads.queries}
    for name, count in counts.items():
        if hasattr(owner, name):
            setattr(owner, name, count)
    if heads.inputs == ("qkv_proj",):
        # Phi-3 reads the number of query heads from the config, which all layers share.
        owner.config = copy.copy(owner.config)
        owner.config.num_attention_heads = counts["num_heads"]


def state_width(network: nn.Module, widths: Sequence[int]) -> None:
    """State the common width of all feed-forward layers in the config, if they have one.

    A transformers config cannot state different widths per layer: such a network runs, but its
    export is refused.
    """
    config: Any = text_config(network)  # Fields depend on the architecture.
    field = next((name for name in WIDTH_FIELDS if hasattr(config, name)), None)
    if field is not None and len(set(widths)) == 1:
        setattr(config, field, widths[0])


class SingleExpertRouter(nn.Module):
    """Router of a block with one expert: every token is routed to it, with weight 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, weights and experts, [T, 1] each for x [T, D]."""
        one_T1 = x.new_ones(len(x), 1)
        return torch.zeros_like(one_T1), one_T1, one_T1.long() - 1
