"""Equal widths for all experts of a network, as configs of transformers and engines require.

Experts of other widths are padded with zeros, which does not change the outputs: a micro-expert of
zeros computes act(0) · 0 = 0.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bench.errors import UserError
from bench.models.network import NetworkConfig, TransformersNetwork
from bench.models.structure.model_structure import ModelStructure, inspect_model
from bench.models.structure.moe_block import MoEBlock


@dataclass(frozen=True)
class ExpertWidths:
    """Widths in a config: of every routed expert, and of all shared experts together."""

    routed: int
    shared: int


def common_widths(config: NetworkConfig, structure: ModelStructure, multiple: int) -> ExpertWidths:
    """Return the smallest widths that fit every expert and the config's fields.

    Both are multiples of `multiple`.
    """
    # A config with width 0 is invalid, so a block of empty experts gets micro-experts of zeros.
    routed = max((1, *(width for block in structure.moe for width in block.widths)))
    shared = max((block.d_shared for block in structure.moe), default=0)
    # DeepSeek's config has no separate width for shared experts: they are `n_shared_experts` times
    # as wide as a routed one, so one width must satisfy both.
    count = getattr(config, "n_shared_experts", None)
    if count:
        routed = _round_up(max(routed, -(-shared // count)), multiple)
        return ExpertWidths(routed, count * routed)
    if hasattr(config, "shared_expert_intermediate_size"):
        shared = _round_up(max(1, shared), multiple)
    return ExpertWidths(_round_up(routed, multiple), shared)


def _round_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def all_experts_have(structure: ModelStructure, widths: ExpertWidths) -> bool:
    """Return whether every expert already has these widths, so that no padding is needed."""
    return all(
        set(block.widths) == {widths.routed} and block.d_shared == widths.shared
        for block in structure.moe
    )


def layer_of_same_field(network: TransformersNetwork, widths: ExpertWidths) -> str | None:
    """Return a layer that is not an expert but shares the config's field of widths, or None."""
    shell = meta_network(config_with_widths(network.config, widths), network.dtype)
    published = meta_network(network.config, network.dtype).state_dict()
    experts = _expert_weights(inspect_model(shell))
    for key, weight in shell.state_dict(keep_vars=True).items():
        if id(weight) not in experts and weight.shape != published[key].shape:
            return key.rpartition(".")[0]
    return None


def network_shape(network: TransformersNetwork, widths: ExpertWidths) -> nn.Module:
    """Build the published network with experts of these widths, on the meta device.

    Raises:
        UserError: the config has a single field for the widths of experts and of other layers.
    """
    other = layer_of_same_field(network, widths)
    if other is not None:
        raise UserError(
            f"the config of {type(network).__name__} states the width of its experts and of "
            f"{other} in one field, so another width of experts cannot be stated: export without "
            "--for"
        )
    return meta_network(config_with_widths(network.config, widths), network.dtype)


@torch.no_grad()
def padded_network(
    network: TransformersNetwork, structure: ModelStructure, widths: ExpertWidths
) -> nn.Module:
    """Return a network of the published class, with every expert padded to the widths.

    All weights except the experts' are shared with `network`, and non-persistent buffers have no
    values, so the result can be saved but not run.
    """
    shell = network_shape(network, widths)
    # `assign` shares the tensors instead of copying into meta tensors, which have no storage;
    # `strict=False` leaves out the experts, which are filled next.
    experts = _expert_weights(structure)
    state = cast(nn.Module, network).state_dict(keep_vars=True)
    others = {key: weight.detach() for key, weight in state.items() if id(weight) not in experts}
    shell.load_state_dict(others, strict=False, assign=True)
    for target, source in zip(inspect_model(shell).moe, structure.moe, strict=True):
        _fill_block(target, source)
    return shell


def meta_network(config: NetworkConfig, dtype: torch.dtype) -> nn.Module:
    """Build a network of the shape in a config, on the meta device."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        network = auto.from_config(copy.deepcopy(config), dtype=dtype)
    return cast(nn.Module, network)


def save_shell(shell: nn.Module, network: TransformersNetwork, folder: Path, **how: Any) -> None:
    """Write a network that represents another one, with the latter's generation config."""
    typed = cast(TransformersNetwork, shell)
    typed.generation_config = network.generation_config
    typed.save_pretrained(folder, **how)


def config_with_widths(config: NetworkConfig, widths: ExpertWidths) -> NetworkConfig:
    """Return a copy of the config with the widths in its architecture's own fields."""
    changed = copy.deepcopy(config)
    own = "moe_intermediate_size"
    setattr(changed, own if hasattr(config, own) else "intermediate_size", widths.routed)
    if hasattr(config, "shared_expert_intermediate_size"):
        setattr(changed, "shared_expert_intermediate_size", widths.shared)  # noqa: B010
    return changed


def _expert_weights(structure: ModelStructure) -> set[int]:
    """Return the identities of all weights of routed and shared experts."""
    # By identity, because names of experts differ between architectures.
    parts = [part for b in structure.moe for part in (b.experts, b.shared) if part is not None]
    return {id(weight) for part in parts for weight in part.parameters()}


def _fill_block(target: MoEBlock, source: MoEBlock) -> None:
    """Allocate a block's experts and copy another block's weights, with zeros elsewhere."""
    # The experts may be empty (all widths 0), but the router never is.
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
            wide.copy_(narrow)
