"""View of one gated expert as micro-experts, independent of how its weights are stored.

Shapes: D d_model, F the expert's intermediate width, S routed tokens.

Micro-expert c of an expert is row c of the gate matrix, row c of the up matrix and column c of the
down matrix: 3·D weights (CAMERA, arXiv 2508.02322, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
Gating = Callable[[Tensor, Tensor], Tensor]
"""Combines gate and up, [S, F] each, channel by channel, into the hidden states [S, F]."""

# Names of (gate, up, down) in per-expert modules: Llama's and Qwen's, then Mixtral's (w2 is down).
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")

ExpertForm = Literal["gated", "fused", "plain"]


@dataclass(frozen=True)
class ExpertView:
    """The three matrices of one expert, sharing memory with the network.

    `gate` and `up`, both [F, D], have one micro-expert per row, `down` [D, F] one per column; `act`
    is the activation of the gate. Writing to them changes the network. `form` is how they are
    stored: in a `fused` expert, gate and up are rows of one matrix. A `plain` expert has no gate:
    `gate` is [0, D], and `act` is the activation of up. `gating` replaces act(gate) · up if a class
    combines them differently, for example with clamps.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    act: Activation
    form: ExpertForm = "gated"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gating: Gating | None = None

    @property
    def width(self) -> int:
        """Number of micro-experts."""
        return self.up.shape[0]

    def hidden(self, x_SD: Tensor) -> Tensor:
        """Compute act(x Wgateᵀ) · (x Wupᵀ), [S, F]: the coefficient of every micro-expert."""
        up_SF = functional.linear(x_SD, self.up, self.up_bias)
        if self.form == "plain":
            return self.act(up_SF)
        gate_SF = functional.linear(x_SD, self.gate, self.gate_bias)
        return self.act(gate_SF) * up_SF if self.gating is None else self.gating(gate_SF, up_SF)

    def combine(self, hidden_SF: Tensor) -> Tensor:
        """Compute hidden Wdownᵀ, [S, D]: the expert's output before the router's weight."""
        return functional.linear(hidden_SF, self.down, self.down_bias)

    def input_matrices(self, order_f: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the stored matrices that read the input, optionally only some micro-experts.

        They are gate and up, each [f, D]; a fused matrix of both [2f, D]; or only up.
        """
        parts = (self.up,) if self.form == "plain" else (self.gate, self.up)
        chosen = tuple(part if order_f is None else part[order_f] for part in parts)
        return (torch.cat(chosen),) if self.form == "fused" else chosen

    def input_biases(self, order_f: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the biases of `input_matrices`, None for matrices without one."""
        parts = (self.up_bias,) if self.form == "plain" else (self.gate_bias, self.up_bias)
        chosen = tuple(b if b is None or order_f is None else b[order_f] for b in parts)
        present = [part for part in chosen if part is not None]
        if self.form == "fused":
            return (torch.cat(present) if present else None,)
        return chosen

    @torch.no_grad()
    def zero(self, channels: Tensor) -> None:
        """Zero the micro-experts with these indices in all matrices and their biases."""
        for weight in (self.gate, self.gate_bias, self.up, self.up_bias):
            # In a plain expert, the gate has no rows.
            if weight is not None and len(weight):
                weight[channels] = 0
        self.down[:, channels] = 0

    @torch.no_grad()
    def copy_(self, source: ExpertView, kept: Tensor | None = None) -> None:
        """Copy another expert, or only its micro-experts `kept` [KEPT], to the first ones here."""
        if kept is None:
            kept = torch.arange(source.width, device=source.down.device)
        # Indices from a ranking may be on the CPU.
        kept = kept.to(source.down.device)
        for name in ("gate", "gate_bias", "up", "up_bias"):
            target, rows = getattr(self, name), getattr(source, name)
            # In a plain expert, the gate has no rows.
            if rows is not None and len(rows):
                target[: len(kept)] = rows.index_select(0, kept)
        self.down[:, : len(kept)] = source.down.index_select(1, kept)
        if source.down_bias is not None and self.down_bias is not None:
            self.down_bias.copy_(source.down_bias)


def sort_slots(expert_S: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Sort slots by expert; return the order [S] and the number of slots of each expert.

    A slot is one token at one of its experts; `expert_S` holds the expert of each.
    """
    # A stable sort keeps the order of tokens within an expert, so that results do not depend on the
    # device. `tolist` is the only synchronisation, because the host needs the sizes.
    counts = torch.bincount(expert_S, minlength=experts).tolist()
    return torch.argsort(expert_S, stable=True), counts


def slots_per_expert(index_TK: Tensor, experts: int) -> Sequence[Tensor]:
    """Return, per expert, the indices of its slots in the flattened selection [T·K].

    On the meta device, where only FLOPs are counted, routing is unknown and assumed to be balanced.
    """
    flat = index_TK.flatten()
    if flat.is_meta:
        return torch.arange(len(flat), device="meta").tensor_split(experts)
    order, counts = sort_slots(flat, experts)
    return torch.split(order, counts)


def fused_view(experts: nn.Module, expert: int) -> ExpertView:
    """View expert `expert` of a fused module, in the layout that the module declares.

    Usually gate_up_proj is [E, 2F, D], gate rows first, and down_proj [E, D, F]. The matrices may
    be transposed, the rows of gate and up interleaved, and there may be biases, or no gate.
    """
    owner = cast(Any, experts)  # Flags and weights depend on the architecture.

    def of_expert(name: str) -> Tensor | None:
        # `detach` drops the graph but shares the storage: in-place writes change the parameter, and
        # autograd does not refuse them.
        stored = getattr(owner, name, None)
        return None if stored is None else stored.detach()[expert]

    def matrix(name: str) -> Tensor:
        stored = of_expert(name)
        assert stored is not None
        return stored.T if owner.is_transposed else stored

    down_DF, down_bias = matrix("down_proj"), of_expert("down_proj_bias")
    if not owner.has_gate:
        up_FD, up_bias = matrix("up_proj"), of_expert("up_proj_bias")
        return ExpertView(
            up_FD[:0], up_FD, down_DF, owner.act_fn, "plain", None, up_bias, down_bias
        )
    gate_FD, up_FD = _halves(matrix("gate_up_proj"), experts)
    both_bias = of_expert("gate_up_proj_bias")
    gate_bias, up_bias = (None, None) if both_bias is None else _halves(both_bias, experts)
    return ExpertView(
        gate_FD,
        up_FD,
        down_DF,
        activation_of(experts),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        gating=gating_of(experts),
    )


def _halves(both_GX: Tensor, experts: nn.Module) -> tuple[Tensor, Tensor]:
    """Split the rows of gate and up, as views."""
    if cast(Any, experts).is_concatenated:
        return both_GX.chunk(2)[0], both_GX.chunk(2)[1]
    return both_GX[0::2], both_GX[1::2]


def gating_of(experts: nn.Module) -> Gating | None:
    """Return how a fused class combines gate and up; None for act(gate) · up."""
    # transformers adds act(gate) ⊙ up to every class without its own `_apply_gate`. The function's
    # module distinguishes the two.
    own = getattr(type(experts), "_apply_gate", None)
    if own is None or getattr(own, "__module__", "") == "transformers.integrations.moe":
        return None

    def gating(gate_SF: Tensor, up_SF: Tensor) -> Tensor:
        # The class expects them as stored: side by side, or interleaved.
        if cast(Any, experts).is_concatenated:
            return cast(Tensor, own(experts, torch.cat([gate_SF, up_SF], dim=-1)))
        both_SF2 = torch.stack([gate_SF, up_SF], dim=-1)
        return cast(Tensor, own(experts, both_SF2.flatten(-2)))

    return gating


def flat_view(experts: nn.Module, expert: int) -> ExpertView:
    """View an expert whose matrices are rows of one matrix for all experts, each [E·F, D] (DBRX).

    w1 is the gate, v1 is up, and w2 is down; the rows of w2 are micro-experts as well.
    """
    stored = cast(Any, experts).mlp
    width = cast(Any, experts).ffn_hidden_size
    rows = slice(expert * width, (expert + 1) * width)
    gate_FD, up_FD, down_FD = (getattr(stored, name).detach()[rows] for name in ("w1", "v1", "w2"))
    return ExpertView(gate_FD, up_FD, down_FD.T, activation_of(experts))


def activation_of(module: nn.Module) -> Activation:
    """Return the activation of an experts module; in a list of experts each expert has it."""
    owner = module[0] if isinstance(module, nn.ModuleList) else module
    for holder in (owner, getattr(owner, "mlp", None)):
        for name in ACTIVATION_NAMES:
            if callable(act := getattr(holder, name, None)):
                return cast(Activation, act)
    if gating_of(owner) is None:
        raise TypeError(f"{type(module).__name__} has no activation")
    return nn.Identity()  # The activation is part of the class's gating (gpt-oss).


def gated_projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """Return the (gate, up, down) linears of a gated feed-forward module, else None."""
    for names in PROJECTION_NAMES:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in found):
            gate, up, down = (cast(nn.Linear, part) for part in found)
            return gate, up, down
    return None


def module_view(module: nn.Module) -> ExpertView:
    """View a gated feed-forward module, such as a shared expert, as an expert."""
    linears = gated_projections(module)
    if linears is None:
        raise TypeError(f"{type(module).__name__} is not a gated feed-forward module")
    gate, up, down = (linear.weight.detach() for linear in linears)
    return ExpertView(gate, up, down, activation_of(module))
