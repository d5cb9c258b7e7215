"""View of one gated expert as micro-experts, wherever its weights are stored.

Shapes: D d_model, F the expert's intermediate width, S routed tokens.

Micro-expert c of an expert is row c of the gate matrix, row c of the up matrix and column c of the
down matrix: 3·D weights (CAMERA, arXiv 2508.02322, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

# Names of (gate, up, down) in per-expert modules: Llama's and Qwen's, then Mixtral's (w2 is down).
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")

ExpertForm = Literal["gated", "fused", "plain"]


@dataclass(frozen=True)
class ExpertView:
    """The three matrices of one expert, sharing memory with the network.

    `gate` and `up`, both [F, D], hold one micro-expert per row, `down` [D, F] one per column; `act`
    is the activation of the gate. Writing to them changes the network. `form` says how they are
    stored: in a `fused` one gate and up are rows of one matrix, and a `plain` one has no gate:
    `gate` is [0, D], and `act` is the activation of up. Routed experts have no biases.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    act: Activation
    form: ExpertForm = "gated"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of micro-experts."""
        return self.up.shape[0]

    def hidden(self, x_SD: Tensor) -> Tensor:
        """Compute act(x Wgateᵀ) · (x Wupᵀ), [S, F]: the coefficient of every micro-expert."""
        up_SF = functional.linear(x_SD, self.up, self.up_bias)
        if self.form == "plain":
            return self.act(up_SF)
        return self.act(functional.linear(x_SD, self.gate, self.gate_bias)) * up_SF

    def combine(self, hidden_SF: Tensor) -> Tensor:
        """Compute hidden Wdownᵀ, [S, D]: the expert's output before the router's weight."""
        return functional.linear(hidden_SF, self.down, self.down_bias)

    def input_matrices(self, order_f: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the matrices that read the input as stored, with only some micro-experts.

        They are gate and up, each [f, D]; their one fused matrix [2f, D]; or up alone.
        """
        parts = (self.up,) if self.form == "plain" else (self.gate, self.up)
        chosen = tuple(part if order_f is None else part[order_f] for part in parts)
        return (torch.cat(chosen),) if self.form == "fused" else chosen

    def input_biases(self, order_f: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the biases of `input_matrices`, None where there is none."""
        parts = (self.up_bias,) if self.form == "plain" else (self.gate_bias, self.up_bias)
        chosen = tuple(b if b is None or order_f is None else b[order_f] for b in parts)
        held = [part for part in chosen if part is not None]
        if self.form == "fused":
            return (torch.cat(held) if held else None,)
        return chosen

    @torch.no_grad()
    def zero(self, channels: Tensor) -> None:
        """Zero the micro-experts with these indices in all matrices and their biases."""
        for weight in (self.gate, self.gate_bias, self.up, self.up_bias):
            # A plain one has a gate without rows.
            if weight is not None and len(weight):
                weight[channels] = 0
        self.down[:, channels] = 0

    @torch.no_grad()
    def copy_(self, source: ExpertView, kept: Tensor | None = None) -> None:
        """Write another expert, or its micro-experts `kept` [KEPT], to the first ones of this."""
        if kept is None:
            kept = torch.arange(source.width, device=source.down.device)
        # Indices may come from a ranking on the CPU.
        kept = kept.to(source.down.device)
        self.gate[: len(kept)] = source.gate.index_select(0, kept)
        self.up[: len(kept)] = source.up.index_select(0, kept)
        self.down[:, : len(kept)] = source.down.index_select(1, kept)


def sort_slots(expert_S: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Sort slots by expert; return the order [S] and the number of slots of each expert.

    A slot is one token at one of its experts; `expert_S` holds the expert of each.
    """
    # A stable sort keeps tokens in order within an expert, so that results do not depend on the
    # device's sort. `tolist` is the one synchronisation: the host has to know the sizes.
    counts = torch.bincount(expert_S, minlength=experts).tolist()
    return torch.argsort(expert_S, stable=True), counts


def fused_view(experts: nn.Module, expert: int) -> ExpertView:
    """View expert `expert` of a fused module: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""
    # `detach` drops the graph but keeps the storage: in-place writes reach the parameter, and
    # autograd does not object to changing a leaf.
    gate_up_GD = cast(Tensor, experts.gate_up_proj).detach()[expert]
    width = gate_up_GD.shape[0] // 2
    down_DF = cast(Tensor, experts.down_proj).detach()[expert]
    act = cast(Activation, experts.act_fn)
    return ExpertView(gate_up_GD[:width], gate_up_GD[width:], down_DF, act)


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
    return ExpertView(gate, up, down, cast(Activation, module.act_fn))
