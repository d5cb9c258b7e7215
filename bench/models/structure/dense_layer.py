"""Feed-forward and attention heads of a decoder layer, whatever its architecture calls them.

Shapes: D d_model, F the feed-forward's width, R rows (outputs), C columns (inputs), KEPT the
micro-experts that are kept.

A feed-forward has one of three forms: gated, y = Wdown (act(Wgate x) ⊙ Wup x); fused, the same
with the rows of gate and up in one matrix (Phi-3); plain, y = Wdown act(Wup x), without a gate. All
may have biases. GPT-2 stores its matrices transposed (`Conv1D`), and OPT keeps them in the decoder
layer itself.

Queries, keys and values have matrices of their own or share one, whose rows are ordered by role
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

# Names of (up, down) in plain feed-forwards: GPT-2 and StarCoder2; OPT and Phi; NeoX, Falcon;
# Nemotron.
PLAIN_NAMES = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)
# Of their one matrix for gate and up, and down: Phi-3; Granite.
FUSED_NAMES = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))

# Fields of configs that hold the width of all feed-forward layers.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def is_projection(module: object) -> TypeGuard[nn.Module]:
    """Whether a module is a linear layer, stored as usual or transposed."""
    # Imported here: a classifier is inspected without transformers.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(projection: nn.Module) -> bool:
    """Whether a projection stores its weight as [C, R] (GPT-2's `Conv1D`)."""
    return not isinstance(projection, nn.Linear)


def weight_of(projection: nn.Module) -> Tensor:
    """Return the weight [R, C] of a projection: a view, so that changes reach the module."""
    weight = cast(Tensor, projection.weight).detach()
    return weight.T if is_transposed(projection) else weight


def bias_of(projection: nn.Module) -> Tensor | None:
    """Return the bias [R] of a projection, or None; a view."""
    bias = cast("Tensor | None", projection.bias)
    return None if bias is None else bias.detach()


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """Return rows and columns without reading the weight, which may be packed."""
    if isinstance(projection, nn.Linear):
        return projection.out_features, projection.in_features
    return cast(int, projection.nf), cast(int, projection.nx)


@torch.no_grad()
def assign_weight(projection: Any, weight_RC: Tensor, bias_R: Tensor | None) -> None:
    """Give a projection a weight and a bias of other sizes, and make its own sizes agree."""
    stored = weight_RC.T if is_transposed(projection) else weight_RC
    # Cloned: the argument may be a view of the weight that is to be freed.
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
    """Where the matrices of a feed-forward layer are: attributes of `owner`, in order.

    `inputs` names gate and up, their one fused matrix, or up alone.
    """

    owner: nn.Module
    inputs: tuple[str, ...]
    output: str
    form: ExpertForm
    act: Activation

    @property
    def sources(self) -> tuple[nn.Module, ...]:
        """The projections whose rows are micro-experts."""
        return tuple(cast(nn.Module, getattr(self.owner, name)) for name in self.inputs)

    @property
    def down(self) -> nn.Module:
        """The projection whose columns are micro-experts."""
        return cast(nn.Module, getattr(self.owner, self.output))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """All of them, in the order in which they run."""
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
        """Number of bias entries that belong to one micro-expert; that of down belongs to none."""
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
        """Keep only the micro-experts `kept` [KEPT], ascending; the rest is freed."""
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
    """Return every feed-forward layer of a known form inside a module, itself included."""
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
"""Rows of a fused matrix: all queries, all keys, all values; or group after group."""
FUSED_ATTENTION: dict[str, tuple[str, str, _RowOrder]] = {
    "Phi3Attention": ("qkv_proj", "o_proj", "by role"),
    "GPT2Attention": ("c_attn", "c_proj", "by role"),
    "GPTNeoXAttention": ("query_key_value", "dense", "by group"),
    "FalconAttention": ("query_key_value", "dense", "by group"),
}
"""Fused matrix, output matrix and order of the rows by class.

By class, since names do not tell the order: GPT-BigCode has GPT-2's, and goes by head.
"""
SEPARATE_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)


@dataclass(frozen=True)
class Heads:
    """Head groups of an attention module: a KV head with its query heads.

    `inputs` names the matrices of queries, keys and values, or the one that they share, and
    `group_rows` gives the group of each of their rows, [R] each. A group owns `queries` consecutive
    columns of the output matrix. `refusal` says what the module does that keeps a group from
    going, or is None.
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
        """The projections whose rows belong to groups."""
        return tuple(cast(nn.Module, getattr(self.owner, name)) for name in self.inputs)

    @property
    def readout(self) -> nn.Module:
        """The projection whose columns belong to groups."""
        return cast(nn.Module, getattr(self.owner, self.output))

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values share a matrix."""
        return len(self.inputs) == 1

    @property
    def reason_to_stay(self) -> str | None:
        """Why no group can go, as a clause whose subject is the attention; None if one can."""
        if self.groups == 1:
            return "has one key-value head for all queries"
        return self.refusal


def find_heads(module: nn.Module) -> list[Heads]:
    """Return the heads of every attention of a known layout inside a module, itself included."""
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
    # Query heads of one KV head are consecutive: the order in which transformers' `repeat_kv`
    # pairs them.
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
    # What is no query is half keys, half values. In GPT-2's cross-attention nothing is a query.
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
    """Make an attention module cut its states into `left` head groups.

    Modules that derive the number from the width of their states have nothing to change.
    """
    owner: Any = heads.owner
    counts = {"num_heads": left * (heads.queries // heads.head_dim), "num_kv_heads": left}
    counts |= {"num_key_value_heads": left, "split_size": left * heads.queries}
    for name, count in counts.items():
        if hasattr(owner, name):
            setattr(owner, name, count)
    if heads.inputs == ("qkv_proj",):
        # Phi-3 reads the number of its queries from the config, which all layers share.
        owner.config = copy.copy(owner.config)
        owner.config.num_attention_heads = counts["num_heads"]


def state_width(network: nn.Module, widths: Sequence[int]) -> None:
    """Make the config state the width of all feed-forward layers, if they have one in common.

    A config of transformers has no place for layers of different widths: such a network runs, and
    its export is refused.
    """
    config: Any = text_config(network)  # fields depend on the architecture
    field = next((name for name in WIDTH_FIELDS if hasattr(config, name)), None)
    if field is not None and len(set(widths)) == 1:
        setattr(config, field, widths[0])


class SingleExpertRouter(nn.Module):
    """Router of a block of one expert: every token goes to it, with weight 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, weights and experts, [T, 1] each for x [T, D]."""
        one_T1 = x.new_ones(len(x), 1)
        return torch.zeros_like(one_T1), one_T1, one_T1.long() - 1
