"""Zero-padding of ragged experts to one width, so that stock transformers loads them.

A micro-expert of zeros computes act(0) · 0 = 0, so the outputs do not change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from bench.models.anatomy import Anatomy, ExpertView, MoEBlock, dissect

# transformers' grouped matmuls need rows of whole 16 bytes, that is 8 half-precision numbers.
WHOLE = 8


@dataclass(frozen=True)
class Widths:
    """Widths in a config: of every routed expert, and of all shared experts together."""

    routed: int
    shared: int


def common_widths(config: Any, anatomy: Anatomy) -> Widths:
    """Return the smallest widths that hold every expert, fit the config's fields, and run."""
    # A width of 0 is no valid config, so a block whose experts are all empty gets one zero
    # micro-expert.
    routed = max(1, *(width for block in anatomy.moe for width in block.widths))
    shared = max(block.d_shared for block in anatomy.moe)
    # DeepSeek's config has no separate width for shared experts: they are `n_shared_experts` times
    # as wide as a routed one, so one width has to satisfy both.
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
    """Whether every expert already has these widths, so that no padding is needed."""
    return all(
        set(block.widths) == {widths.routed} and block.d_shared == widths.shared
        for block in anatomy.moe
    )


@torch.no_grad()
def padded(network: nn.Module, anatomy: Anatomy, widths: Widths) -> nn.Module:
    """Return a network of the published class, with every expert padded to the widths.

    All weights except the experts' are shared with `network`, and non-persistent buffers have no
    value: the result is for saving, not for running.
    """
    whole: Any = network
    shell = empty_network(_with_widths(whole.config, widths), whole.dtype)
    # `assign` shares the tensors instead of copying into meta tensors, which have no storage;
    # `strict=False` leaves out the experts, which are filled next.
    shell.load_state_dict(_outside_experts(network, anatomy), strict=False, assign=True)
    for target, source in zip(dissect(shell).moe, anatomy.moe, strict=True):
        _fill(target, source)
    return shell


def empty_network(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a network of the shape in a config, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return cast(nn.Module, network)


def _with_widths(config: Any, widths: Widths) -> Any:
    """Return a copy of the config with the widths, under its architecture's field names."""
    changed = copy.deepcopy(config)
    own = "moe_intermediate_size"
    setattr(changed, own if hasattr(config, own) else "intermediate_size", widths.routed)
    if hasattr(config, "shared_expert_intermediate_size"):
        changed.shared_expert_intermediate_size = widths.shared
    return changed


def _outside_experts(network: nn.Module, anatomy: Anatomy) -> dict[str, torch.Tensor]:
    """Return the state of everything except routed and shared experts."""
    # By identity, not by name: names of experts differ between architectures. `keep_vars` returns
    # the parameters themselves, without which identities would be those of detached copies.
    ours = {id(weight) for block in anatomy.moe for weight in block.experts.parameters()}
    for block in anatomy.moe:
        ours |= {id(weight) for weight in block.shared.parameters()} if block.shared else set()
    state = network.state_dict(keep_vars=True)
    return {key: weight.detach() for key, weight in state.items() if id(weight) not in ours}


def _fill(target: MoEBlock, source: MoEBlock) -> None:
    """Allocate a block's experts and copy another block's weights, zeros elsewhere."""
    # The experts themselves may be empty (all widths 0), the router never is.
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
    wide.gate[: narrow.width] = narrow.gate
    wide.up[: narrow.width] = narrow.up
    wide.down[:, : narrow.width] = narrow.down
