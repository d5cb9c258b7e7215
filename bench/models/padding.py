"""Filling ragged experts up with zeros to one width, which stock transformers can load.

A micro-expert of zeros computes act(0) · 0 = 0, so the outputs stay as they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from bench.models.anatomy import Anatomy, ExpertView, MoEBlock, dissect

WHOLE = 8


@dataclass(frozen=True)
class Widths:
    """The widths that a config gives to every routed expert and to all shared ones together."""

    routed: int
    shared: int


def common_widths(config: Any, anatomy: Anatomy) -> Widths:
    """Return the least widths that hold every expert, that such a config can say, and that run.

    transformers' grouped products need rows of whole 16 bytes, which 8 half-precision numbers are.
    """
    routed = max(1, *(width for block in anatomy.moe for width in block.widths))
    shared = max(block.d_shared for block in anatomy.moe)
    # DeepSeek's config has no width of its own for shared experts: they are so many routed ones.
    count = getattr(config, "n_shared_experts", None)
    if count:
        routed = max(routed, -(-shared // count))
    routed = -(-routed // WHOLE) * WHOLE
    if count:
        shared = count * routed
    elif hasattr(config, "shared_expert_intermediate_size"):
        shared = max(1, shared)
    return Widths(routed, shared)


def fits(anatomy: Anatomy, widths: Widths) -> bool:
    """Whether every expert has these widths already, so that nothing need be filled up."""
    return all(
        set(block.widths) == {widths.routed} and block.d_shared == widths.shared
        for block in anatomy.moe
    )


@torch.no_grad()
def padded(network: nn.Module, anatomy: Anatomy, widths: Widths) -> nn.Module:
    """Return a network as its class builds it, with every expert filled up to the widths.

    All weights but the experts' are shared with `network`, and buffers that are never stored have
    no value: it is for saving, not for running.
    """
    whole: Any = network
    shell = empty_network(_with_widths(whole.config, widths), whole.dtype)
    shell.load_state_dict(_outside_experts(network, anatomy), strict=False, assign=True)
    for target, source in zip(dissect(shell).moe, anatomy.moe, strict=True):
        _fill(target, source)
    return shell


def empty_network(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a network of the shape that a config says, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return cast(nn.Module, network)


def _with_widths(config: Any, widths: Widths) -> Any:
    """Return a config that says the widths, under the names that its architecture has for them."""
    changed = copy.deepcopy(config)
    own = "moe_intermediate_size"
    setattr(changed, own if hasattr(config, own) else "intermediate_size", widths.routed)
    if hasattr(config, "shared_expert_intermediate_size"):
        changed.shared_expert_intermediate_size = widths.shared
    return changed


def _outside_experts(network: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Return the state of everything but routed and shared experts."""
    ours = {id(weight) for block in anatomy.moe for weight in block.experts.parameters()}
    for block in anatomy.moe:
        ours |= {id(weight) for weight in block.shared.parameters()} if block.shared else set()
    state = network.state_dict(keep_vars=True)
    return {key: weight.detach() for key, weight in state.items() if id(weight) not in ours}


def _fill(target: MoEBlock, source: MoEBlock) -> None:
    """Give a block's experts memory and the weights of another block's, zeros beyond them."""
    device = next(source.router.parameters()).device
    for part in (target.experts, target.shared):
        if part is not None:
            part.to_empty(device=device)
            for weight in part.parameters():
                weight.zero_()
    pairs = [(target.expert(e), source.expert(e)) for e in range(source.num_experts)]
    shared = (target.shared_view(), source.shared_view())
    for wide, narrow in (*pairs, shared):
        if wide is not None and narrow is not None:
            _copy(narrow, wide)


def _copy(narrow: ExpertView, wide: ExpertView) -> None:
    """Write an expert into the first micro-experts of a wider one."""
    wide.gate[: narrow.width] = narrow.gate
    wide.up[: narrow.width] = narrow.up
    wide.down[:, : narrow.width] = narrow.down
