"""Experts of different widths, routed and shared, stored and run without removed weights.

Shapes: T tokens, K experts per token, S = T·K slots (a slot is one token at one of its experts), E
experts, G experts of one bucket, D d_model, F an expert's width, W a bucket's width.

Experts whose widths round up to the same multiple of `align` share a bucket: two dense tensors
[G, 2W, D] and [G, D, W], in which an expert narrower than W is padded with zero rows and columns.
So every matmul is dense with aligned sizes, one grouped kernel can process a bucket, and the
padding is less than `align` micro-experts per expert. An expert of width 0 has no storage; tokens
are still routed to it, with unchanged router weights, and get zeros, or its output bias. Experts
without a gate have [G, W, D] instead of [G, 2W, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.dense_layer import FeedForward, feed_forwards
from bench.models.structure.expert_view import (
    Activation,
    ExpertView,
    Gating,
    activation_of,
    gating_of,
    sort_slots,
)


@dataclass(frozen=True)
class WidthBucket:
    """Experts stored with the same width, in storage order."""

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

    The arguments are those of transformers' fused experts: hidden states [T, D], the experts of
    each token [T, K] and the router's weights [T, K]. The result is [T, D].

    Experts without `gated` have no gate; with `biased` every micro-expert has biases and every
    expert an output bias; `gating` replaces act(gate) · up.
    """

    down_bias: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        d_model: int,
        act_fn: Activation,
        align: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        gated: bool = True,
        biased: bool = False,
        gating: Gating | None = None,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.d_model = d_model
        self.act_fn = act_fn
        self.align = align
        self.gated, self.biased, self.gating = gated, biased, gating
        self.buckets = make_buckets(widths, align)
        stored = [expert for bucket in self.buckets for expert in bucket.experts]
        # Rank of each expert in storage order, bucket by bucket.
        self._rank = [stored.index(expert) for expert in range(len(stored))]

        def allocate(name: str, *shape: int) -> None:
            # Named by width and registered on this module instead of a submodule per bucket,
            # because accelerate moves the weights of a module when its forward is called.
            zeros = torch.zeros(*shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(zeros, False))

        for bucket in self.buckets:
            if bucket.width:
                count, rows = len(bucket.experts), bucket.width * self._parts
                allocate(f"gate_up_{bucket.width}", count, rows, d_model)
                allocate(f"down_{bucket.width}", count, d_model, bucket.width)
                if biased:
                    allocate(f"gate_up_bias_{bucket.width}", count, rows)
        if biased:
            # One per expert, in the experts' own order, and kept if an expert becomes empty.
            allocate("down_bias", len(widths), d_model)

    @property
    def _parts(self) -> int:
        """Number of input rows of a micro-expert."""
        return 2 if self.gated else 1

    @property
    def padding(self) -> int:
        """Number of zero micro-experts stored for alignment."""
        stored = sum(bucket.width * len(bucket.experts) for bucket in self.buckets)
        return stored - sum(self.widths)

    def padding_parameters(self) -> int:
        """Return the number of parameters of padded micro-experts."""
        return 3 * self.d_model * self.padding

    def spec(self) -> ModuleSpec:
        """Return widths, d_model and alignment, and deviations from the usual form."""
        spec = {"widths": list(self.widths), "d_model": self.d_model, "align": self.align}
        unusual = {"gated": self.gated} if not self.gated else {}
        return spec | unusual | ({"biased": True} if self.biased else {})

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build the experts with zeros, on the current default device and in the default dtype."""
        return cls(
            [int(width) for width in spec["widths"]],
            int(spec["d_model"]),
            activation_of(original),
            int(spec["align"]),
            gated=bool(spec.get("gated", True)),
            biased=bool(spec.get("biased", False)),
            gating=gating_of(original),
        )

    def weights(self, bucket: WidthBucket) -> tuple[Tensor, Tensor]:
        """Return gate-and-up [G, 2W, D] and down [G, D, W] of a non-empty bucket."""
        # Not `get_parameter`, because FLOPs are counted with fake tensors instead of parameters.
        names = f"gate_up_{bucket.width}", f"down_{bucket.width}"
        gate_up, down = (getattr(self, name) for name in names)
        return gate_up, down

    def _input_bias(self, bucket: WidthBucket) -> Tensor | None:
        """Return the biases of gate and up, [G, 2W]."""
        return getattr(self, f"gate_up_bias_{bucket.width}") if self.biased else None

    def view(self, expert: int) -> ExpertView:
        """View one expert without its padding; writing to it changes the weights."""
        width = self.widths[expert]
        bucket = next(bucket for bucket in self.buckets if expert in bucket.experts)
        down_bias = self.down_bias.detach()[expert] if self.biased else None
        if not bucket.width:
            return self._empty_view(down_bias)
        # Gate rows are the first half of the bucket's 2W rows and up rows the second, so an
        # expert's own rows are the first `width` of each half.
        place = bucket.experts.index(expert)
        gate_up_GWD, down_GDW = (weight.detach() for weight in self.weights(bucket))
        biases = self._input_bias(bucket)
        gate_WD, up_WD = self._split(gate_up_GWD[place])
        gate_bias, up_bias = (None, None)
        if biases is not None:
            gate_bias, up_bias = (part[:width] for part in self._split(biases.detach()[place]))
        return ExpertView(
            gate_WD[:width],
            up_WD[:width],
            down_GDW[place, :, :width],
            self.act_fn,
            form="gated" if self.gated else "plain",
            gate_bias=gate_bias if self.gated else None,
            up_bias=up_bias,
            down_bias=down_bias,
            gating=self.gating,
        )

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split into the rows of gate, of which there may be none, and of up."""
        if not self.gated:
            return rows[:0], rows
        gate, up = rows.chunk(2)
        return gate, up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x) for every token, [T, D]."""
        tokens, top_k = top_k_index.shape
        # Most blocks pass tokens in one dimension, DBRX in two.
        shape, hidden_states = hidden_states.shape, hidden_states.flatten(0, -2)
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
        # Gathered by the inverse permutation and summed in a fixed order, because an `index_add_`
        # into [T, D] is not deterministic on CUDA.
        back_S = torch.empty_like(slot_S)
        back_S[slot_S] = torch.arange(len(slot_S), device=slot_S.device)
        y_TKD = torch.cat(pieces)[back_S].view(tokens, top_k, self.d_model)
        return y_TKD.sum(dim=1).to(hidden_states.dtype).view(shape)

    def _by_bucket(self, index_TK: Tensor) -> tuple[Tensor, list[int]]:
        """Return slots sorted by bucket, expert and token, and the number of slots per expert."""
        chosen_S = index_TK.flatten()
        if chosen_S.device.type == "meta":
            # Meta tensors have no values and are only for counting FLOPs, so routing is assumed to
            # be balanced. Real routing is not: after pruning, busy experts may be wider or narrower
            # than the mean, and a count on real tokens then differs from this one and from the
            # analytic one.
            each, over = divmod(len(chosen_S), len(self.widths))
            counts = [each + (rank < over) for rank in range(len(self.widths))]
            return torch.argsort(chosen_S), counts
        rank_S = torch.tensor(self._rank, device=chosen_S.device)[chosen_S]
        return sort_slots(rank_S, len(self.widths))

    def _outputs(
        self, bucket: WidthBucket, x_SD: Tensor, weight_S: Tensor, counts: list[int]
    ) -> Iterator[Tensor]:
        """Yield the weighted outputs of a bucket's experts; slots are sorted by expert."""
        if not bucket.width:
            # Multiplied like the outputs of other buckets, so that the dtype is the same: the
            # router's weights may be float32.
            yield (torch.zeros_like(x_SD) + self._output_bias(bucket, counts)) * weight_S[:, None]
        elif _use_grouped_kernel(x_SD):
            yield self.grouped(bucket, x_SD, counts) * weight_S[:, None]
        elif x_SD.device.type == "meta":
            # Only for counting FLOPs. The experts of a bucket have the same width, so one product
            # over all tokens has the FLOPs of theirs, with fewer dispatches.
            gate_up_WD, down_DW = (weight[0] for weight in self.weights(bucket))
            yield self._expert(x_SD, gate_up_WD, down_DW) * weight_S[:, None]
        else:
            biases = self._input_bias(bucket)
            parts = zip(
                *self.weights(bucket),
                [None] * len(counts) if biases is None else biases,
                x_SD.split(counts),
                weight_S.split(counts),
                bucket.experts,
                strict=True,
            )
            for gate_up_WD, down_DW, bias, x, weight, expert in parts:
                if len(x):
                    bias_D = self.down_bias[expert] if self.biased else None
                    y_SD = self._expert(x, gate_up_WD, down_DW, bias, bias_D)
                    yield y_SD * weight[:, None]

    def _expert(
        self,
        x_SD: Tensor,
        gate_up_WD: Tensor,
        down_DW: Tensor,
        bias_W: Tensor | None = None,
        bias_D: Tensor | None = None,
    ) -> Tensor:
        hidden_SW = self._gated(functional.linear(x_SD, gate_up_WD, bias_W))
        return functional.linear(hidden_SW, down_DW, bias_D)

    def _output_bias(self, bucket: WidthBucket, counts: list[int]) -> Tensor | float:
        """Return the output bias of every slot of a bucket, [S, D]; 0 without biases."""
        if not self.biased:
            return 0.0
        expert_S = torch.tensor(bucket.experts).repeat_interleave(torch.tensor(counts))
        return self.down_bias[expert_S.to(self.down_bias.device)]

    def grouped(self, bucket: WidthBucket, x_SD: Tensor, counts: list[int]) -> Tensor:
        """Compute the unweighted outputs of a bucket's experts with two grouped matmuls."""
        gate_up_GWD, down_GDW = self.weights(bucket)
        # `grouped_mm` takes the end offset of each group as int32, and weights as [G, in, out], for
        # which the transpose is a view.
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x_SD.device)
        both_SW = functional.grouped_mm(x_SD, gate_up_GWD.transpose(1, 2), offs=ends)
        biases = self._input_bias(bucket)
        if biases is not None:
            both_SW = both_SW + biases.repeat_interleave(
                torch.tensor(counts, device=biases.device), dim=0
            )
        y_SD = functional.grouped_mm(self._gated(both_SW), down_GDW.transpose(1, 2), offs=ends)
        return y_SD + self._output_bias(bucket, counts) if self.biased else y_SD

    def _gated(self, both_SW: Tensor) -> Tensor:
        if not self.gated:
            return self.act_fn(both_SW)
        gate_SW, up_SW = both_SW.chunk(2, dim=-1)
        if self.gating is not None:
            return self.gating(gate_SW, up_SW)
        return self.act_fn(gate_SW) * up_SW

    def _empty_view(self, down_bias: Tensor | None) -> ExpertView:
        like = next(self.parameters(), torch.empty(0))
        # `parameters()` is empty if every expert has width 0, hence the default dtype.
        gate_FD = like.new_empty(0, self.d_model)
        none_F = like.new_empty(0) if self.biased else None
        return ExpertView(
            gate_FD,
            gate_FD,
            like.new_empty(self.d_model, 0),
            self.act_fn,
            form="gated" if self.gated else "plain",
            gate_bias=none_F if self.gated else None,
            up_bias=none_F,
            down_bias=down_bias,
            gating=self.gating,
        )


def _use_grouped_kernel(x_SD: Tensor) -> bool:
    # Only bfloat16 on CUDA has a fused kernel; on a CPU `grouped_mm` also loops over groups.
    grouped = hasattr(functional, "grouped_mm") and x_SD.dtype == torch.bfloat16
    return grouped and x_SD.device.type == "cuda"


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

    # JSON cannot store the activation, so `from_spec` takes it from the replaced module.
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


class NarrowedFeedForward(ReplacedModule):
    """Shared experts of a class that `GatedExpert` cannot replace, narrowed in place.

    The class may store gate and up in one matrix (Granite), have no gate (Nemotron-H) or clamp
    them (DeepSeek-V4), so it is kept with fewer micro-experts.
    """

    def __init__(self, original: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.inner = original
        self.feed_forward.narrow(kept)

    @property
    def feed_forward(self) -> FeedForward:
        """The projections of the feed-forward."""
        (found,) = feed_forwards(self.inner)
        return found

    def spec(self) -> ModuleSpec:
        """Return the width."""
        return {"width": self.feed_forward.width}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Narrow a module of the published width, keeping its first micro-experts."""
        return cls(original, torch.arange(int(spec["width"])))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output, [..., D] for x [..., D]."""
        y: Tensor = self.inner(x)
        return y


def _linear_from_weight(weight: Tensor) -> nn.Linear:
    """Return a linear layer with this weight, which may have width 0."""
    # `nn.Linear(width, ...)` would initialise a weight that is not used, and warn about a tensor of
    # width 0. The 1x1 layer on meta does neither.
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
