"""Experts of different widths, routed and shared, stored and run without removed weights.

Shapes: T tokens, K experts per token, S = T·K slots (a slot is one token at one of its experts), E
experts, G experts of one bucket, D d_model, F an expert's width, W a bucket's width.

Experts whose widths round up to the same multiple of `align` share a bucket: two dense tensors
[G, 2W, D] and [G, D, W], in which an expert narrower than W is padded with zero rows and columns.
Every matmul is therefore dense with aligned sizes, one grouped kernel can process a bucket, and the
padding stays below `align` micro-experts per expert. An expert of width 0 has no storage; tokens
are still routed to it, with the router's weight unchanged, and receive zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.expert_view import Activation, ExpertView, sort_slots


@dataclass(frozen=True)
class WidthBucket:
    """Experts stored at the same width; their order is their position in the storage."""

    width: int
    experts: tuple[int, ...]


def make_buckets(widths: Sequence[int], align: int) -> tuple[WidthBucket, ...]:
    """Group experts with these widths into buckets, narrowest first."""
    aligned = [-(-width // align) * align for width in widths]
    return tuple(
        WidthBucket(width, tuple(e for e, own in enumerate(aligned) if own == width))
        for width in sorted(set(aligned))
    )


class RaggedExperts(ReplacedModule):
    """Routed experts of one block, each with its own width.

    The call takes what a fused experts module of transformers takes: hidden states [T, D], the
    experts of each token [T, K] and the router's weights [T, K]. It returns [T, D].
    """

    def __init__(
        self,
        widths: Sequence[int],
        d_model: int,
        act_fn: Activation,
        align: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.d_model = d_model
        self.act_fn = act_fn
        self.align = align
        self.buckets = make_buckets(widths, align)
        stored = [expert for bucket in self.buckets for expert in bucket.experts]
        # Rank of each expert in storage order, which is by bucket.
        self._rank = [stored.index(expert) for expert in range(len(stored))]
        for bucket in self.buckets:
            if bucket.width:
                count, width = len(bucket.experts), bucket.width
                gate_up_GWD = torch.zeros(count, 2 * width, d_model, dtype=dtype, device=device)
                down_GDW = torch.zeros(count, d_model, width, dtype=dtype, device=device)
                # Named by width and registered on this module, not on a submodule per bucket:
                # accelerate moves the weights of a module when its forward is called, and a bucket
                # has no forward.
                self.register_parameter(f"gate_up_{width}", nn.Parameter(gate_up_GWD, False))
                self.register_parameter(f"down_{width}", nn.Parameter(down_GDW, False))

    @property
    def padding(self) -> int:
        """Number of zero micro-experts stored for alignment."""
        stored = sum(bucket.width * len(bucket.experts) for bucket in self.buckets)
        return stored - sum(self.widths)

    def padding_parameters(self) -> int:
        """Return the parameters of the padding: a gate, an up row and a down column for each."""
        return 3 * self.d_model * self.padding

    def spec(self) -> ModuleSpec:
        """Return widths, d_model and alignment."""
        return {"widths": list(self.widths), "d_model": self.d_model, "align": self.align}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build the experts with zeros, on the current default device and in the default dtype."""
        widths = [int(width) for width in spec["widths"]]
        act_fn = activation_of(original)
        return cls(widths, int(spec["d_model"]), act_fn, int(spec["align"]))

    def weights(self, bucket: WidthBucket) -> tuple[Tensor, Tensor]:
        """Return gate-and-up [G, 2W, D] and down [G, D, W] of a non-empty bucket."""
        # Not `get_parameter`: FLOPs are counted on fake tensors in place of the parameters.
        names = f"gate_up_{bucket.width}", f"down_{bucket.width}"
        gate_up, down = (getattr(self, name) for name in names)
        return gate_up, down

    def view(self, expert: int) -> ExpertView:
        """View one expert without its padding; writing to it changes the weights."""
        width = self.widths[expert]
        bucket = next(bucket for bucket in self.buckets if expert in bucket.experts)
        if not bucket.width:
            return self._empty_view()
        # Gate rows fill the first half of the bucket's 2W rows and up rows the second, so an
        # expert's own rows are the first `width` of each half.
        place = bucket.experts.index(expert)
        gate_up_GWD, down_GDW = (weight.detach() for weight in self.weights(bucket))
        gate_WD, up_WD = gate_up_GWD[place].chunk(2)
        return ExpertView(gate_WD[:width], up_WD[:width], down_GDW[place, :, :width], self.act_fn)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x) for every token, [T, D]."""
        tokens, top_k = top_k_index.shape
        slot_S, counts = self._by_bucket(top_k_index)
        weight_S = top_k_weights.flatten()[slot_S]
        pieces: list[Tensor] = []
        waiting, begin = iter(counts), 0
        for bucket in self.buckets:
            mine = list(islice(waiting, len(bucket.experts)))
            place = slice(begin, begin + sum(mine))
            if place.stop > begin:
                x_SD = hidden_states[slot_S[place] // top_k]
                pieces += self._outputs(bucket, x_SD, weight_S[place], mine)
            begin = place.stop
        # Inverse permutation: gather and sum in a fixed order. An `index_add_` into [T, D] would be
        # shorter, but its order of additions is not deterministic on CUDA.
        back_S = torch.empty_like(slot_S)
        back_S[slot_S] = torch.arange(len(slot_S), device=slot_S.device)
        y_TKD = torch.cat(pieces)[back_S].view(tokens, top_k, self.d_model)
        return y_TKD.sum(dim=1).to(hidden_states.dtype)

    def _by_bucket(self, index_TK: Tensor) -> tuple[Tensor, list[int]]:
        """Return slots sorted by bucket, expert and token, and the number of slots per expert."""
        chosen_S = index_TK.flatten()
        if chosen_S.device.type == "meta":
            # Meta tensors have no values, and only FLOPs are counted there, so routing is assumed
            # to be even. Real routing is not: after pruning, busy experts may be wider or narrower
            # than the mean, and a count on real tokens then differs from the count on meta and from
            # the analytic figure.
            each, over = divmod(len(chosen_S), len(self.widths))
            counts = [each + (rank < over) for rank in range(len(self.widths))]
            return torch.argsort(chosen_S), counts
        rank_S = torch.tensor(self._rank, device=chosen_S.device)[chosen_S]
        return sort_slots(rank_S, len(self.widths))

    def _outputs(
        self, bucket: WidthBucket, x_SD: Tensor, weight_S: Tensor, counts: list[int]
    ) -> Iterator[Tensor]:
        """Yield the weighted outputs of a bucket's experts; slots arrive sorted by expert."""
        if not bucket.width:
            # Multiplied like the other buckets' outputs, so that the dtype is the same: the
            # router's weights may be float32.
            yield torch.zeros_like(x_SD) * weight_S[:, None]
        elif _use_grouped_kernel(x_SD):
            yield self.grouped(bucket, x_SD, counts) * weight_S[:, None]
        else:
            parts = zip(
                *self.weights(bucket), x_SD.split(counts), weight_S.split(counts), strict=True
            )
            for gate_up_WD, down_DW, x, weight in parts:
                if len(x):
                    hidden_SW = self._gated(functional.linear(x, gate_up_WD))
                    yield functional.linear(hidden_SW, down_DW) * weight[:, None]

    def grouped(self, bucket: WidthBucket, x_SD: Tensor, counts: list[int]) -> Tensor:
        """Compute the unweighted outputs of a bucket's experts with two grouped matmuls."""
        gate_up_GWD, down_GDW = self.weights(bucket)
        # `grouped_mm` takes the end offset of each group as int32, and weights as [G, in, out]: the
        # transpose is a view.
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x_SD.device)
        both_SW = functional.grouped_mm(x_SD, gate_up_GWD.transpose(1, 2), offs=ends)
        return functional.grouped_mm(self._gated(both_SW), down_GDW.transpose(1, 2), offs=ends)

    def _gated(self, both_SW: Tensor) -> Tensor:
        gate_SW, up_SW = both_SW.chunk(2, dim=-1)
        return self.act_fn(gate_SW) * up_SW

    def _empty_view(self) -> ExpertView:
        like = next(self.parameters(), torch.empty(0))
        # `parameters()` is empty when every expert has width 0; then the default dtype has to do.
        gate_FD = like.new_empty(0, self.d_model)
        return ExpertView(gate_FD, gate_FD, like.new_empty(self.d_model, 0), self.act_fn)


def _use_grouped_kernel(x_SD: Tensor) -> bool:
    # Only bfloat16 on CUDA has a fused kernel; on a CPU `grouped_mm` is itself a loop over groups.
    grouped = hasattr(functional, "grouped_mm") and x_SD.dtype == torch.bfloat16
    return grouped and x_SD.device.type == "cuda"


def activation_of(module: nn.Module) -> Activation:
    """Return the activation of an experts module; in a list of experts the members hold it."""
    owner = module[0] if isinstance(module, nn.ModuleList) else module
    return cast(Activation, owner.act_fn)


class GatedExpert(ReplacedModule):
    """y = Wdown (act(Wgate x) ⊙ Wup x), with the parameter names of published shared experts."""

    def __init__(
        self,
        width: int,
        d_model: int,
        act_fn: Activation,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        inner_FD = torch.zeros(width, d_model, dtype=dtype, device=device)
        self.gate_proj = _linear_from_weight(inner_FD)
        self.up_proj = _linear_from_weight(inner_FD.clone())
        self.down_proj = _linear_from_weight(inner_FD.new_zeros(d_model, width))
        self.act_fn = act_fn

    # The activation is no JSON value: `from_spec` takes it from the module that is replaced.
    def spec(self) -> ModuleSpec:
        """Return width and d_model."""
        return {"width": self.gate_proj.out_features, "d_model": self.gate_proj.in_features}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build the expert with zeros, on the current default device and in the default dtype."""
        return cls(int(spec["width"]), int(spec["d_model"]), activation_of(original))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the expert's output, [..., D] for x [..., D]."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


def _linear_from_weight(weight: Tensor) -> nn.Linear:
    """Return a linear layer with this weight, which may have width 0."""
    # `nn.Linear(width, ...)` would initialise a weight that is thrown away, and warns that
    # initialising a tensor of width 0 does nothing. The 1x1 layer on meta costs neither.
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
