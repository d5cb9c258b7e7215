"""Rebuilding of packed modules from JSON, so that packed weights can be loaded.

A state dict contains the buffers, but not their meaning. `describe_packed` states it for every
packed layer; `install_packed` puts empty modules of these shapes into a network of the original
architecture, whose `load_state_dict` then fills the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn

from bench.errors import UserError
from bench.models.packed.linear import PackedLinear, packed_linears
from bench.models.packed.modules import PackedExpert, PackedExperts
from bench.models.packed.shape import Level, PackedShape

PARTS = ("gate_proj", "up_proj", "down_proj")


def describe(network: nn.Module) -> dict[str, Any]:
    """Return the shapes of all packed layers by name, and the names of packed experts."""
    experts = {
        name: len(module)
        for name, module in network.named_modules()
        if isinstance(module, PackedExperts)
    }
    return {
        "experts": experts,
        "linears": {name: _description(linear) for name, linear in packed_linears(network)},
    }


def install(
    network: nn.Module, description: Mapping[str, Any], device: torch.device | None = None
) -> None:
    """Replace the modules named in the description by empty packed ones on `device`.

    Raises:
        UserError: the description does not match the network.
    """
    try:
        linears = {name: _empty(entry, device) for name, entry in description["linears"].items()}
        # Experts first: their layers are submodules of a module that does not exist before.
        for name, count in description["experts"].items():
            _install_experts(network, name, int(count), linears)
        for name, linear in linears.items():
            # Biases are not packed: the parameter of the original layer is taken over, and loaded
            # as usual.
            linear.bias = cast(nn.Linear, network.get_submodule(name)).bias
            network.set_submodule(name, linear)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"slimbench.json: the packed weights do not match the network: {error}"
        ) from None


def _install_experts(
    network: nn.Module, name: str, count: int, linears: dict[str, PackedLinear]
) -> None:
    """Replace a block's experts by packed ones, and take their layers out of `linears`."""
    before = network.get_submodule(name)
    # Fused modules hold the activation themselves, a list of experts in its members.
    act = getattr(before, "act_fn", None) or before.get_submodule("0").act_fn
    experts = []
    for number in range(count):
        gate, up, down = (linears.pop(f"{name}.{number}.{part}") for part in PARTS)
        experts.append(PackedExpert(gate, up, down, cast(Any, act)))
    network.set_submodule(name, PackedExperts(experts))


def _description(linear: PackedLinear) -> dict[str, Any]:
    return {**asdict(linear.shape), "dtype": str(linear.dtype).removeprefix("torch.")}


def _empty(entry: Mapping[str, Any], device: torch.device | None) -> PackedLinear:
    fields = dict(entry)
    dtype = getattr(torch, fields.pop("dtype"))
    levels = tuple(Level(*level) for level in fields.pop("levels"))
    return PackedLinear(PackedShape(levels=levels, **fields), dtype, device=device)
