"""Sizes of a model: parameters, nonzero and active ones, bytes of weights and of a KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.models.bitpacking.packed_modules import count_parameters, packed_linears
from bench.models.network import stored_bytes, text_config
from bench.models.offload import iter_parameters
from bench.models.replaced_modules import ReplacedModule

if TYPE_CHECKING:
    from transformers import Cache

    from bench.models.structure.model_structure import ModelStructure


@dataclass(frozen=True)
class ModelSize:
    """Counts of one network; `active` is the number of parameters used by one token's forward."""

    parameters: int
    nonzero: int
    active: int
    bytes: int
    routed: int
    shared: int


def count_nonzero(network: nn.Module) -> int:
    """Return the number of nonzero parameters, with packed ones by their unpacked values."""
    # Offloaded weights are loaded one at a time, because they may not fit in memory together.
    packed = (linear.weight for _, linear in packed_linears(network))
    return sum(int(weight.count_nonzero()) for weight in chain(iter_parameters(network), packed))


def count_padding(network: nn.Module) -> int:
    """Return the number of parameters that only pad the storage of other weights."""
    parts = [module for module in network.modules() if isinstance(module, ReplacedModule)]
    return sum(part.padding_parameters() for part in parts)


def held_tensors(network: nn.Module) -> list[Tensor]:
    """Return the floating-point tensors of modules other than parameters and packed storage.

    They are buffers, and tensors in plain attributes or in their lists and mappings. Views of
    parameters do not count.
    """
    packed = {id(held) for _, linear in packed_linears(network) for held in linear.buffers()}
    known = set(map(_address, network.parameters())) - {0}
    found: dict[int, Tensor] = {}
    for module in network.modules():
        for tensor in (*module.buffers(recurse=False), *_attribute_tensors(module)):
            counts = tensor.is_floating_point() and id(tensor) not in packed
            if counts and _address(tensor) not in known:
                found[id(tensor)] = tensor
    return list(found.values())


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 for one without its own storage."""
    # Offloaded parameters are on the meta device; sparse tensors and wrappers consist of others.
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _attribute_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield tensors in a module's plain attributes, which neither torch nor saved files include."""
    for name, value in vars(module).items():
        # Attributes in which torch stores registered tensors and modules.
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from _tensors_in(value, MAX_NESTING)


MAX_NESTING = 3
"""Levels of nested lists and mappings that are searched for tensors: enough for a list per layer,
and a limit for structures that contain themselves."""


def _tensors_in(value: object, levels: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield value
    elif levels and isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part, levels - 1)


def count_size(network: nn.Module, structure: ModelStructure | None = None) -> ModelSize:
    """Count a network's parameters: tied tensors once, packed weights by their unpacked number.

    A token is routed to k of a layer's E experts, so k/E of the routed parameters are active; all
    others, including embeddings and head, count as active. Modules in which a method replaced the
    experts report how many of their parameters are routed.
    """
    total = count_parameters(network)
    routed, idle, shared = 0, 0.0, 0
    for block in structure.blocks if structure else ():
        here = _numel(block.experts)
        routed += here
        idle += here * (1 - block.top_k / block.num_experts)
        shared += _numel(block.shared) if block.shared is not None else 0
    # Replaced modules count only if no block was recognised, or they would be counted twice.
    for part, experts in (
        _routed_in_replaced_modules(network) if structure and not structure.blocks else ()
    ):
        routed += part
        idle += part * (1 - experts_per_token(network) / experts)
    return ModelSize(
        parameters=total,
        nonzero=count_nonzero(network),
        active=round(total - idle),
        bytes=stored_bytes(network),
        routed=routed,
        shared=shared,
    )


def _routed_in_replaced_modules(network: nn.Module) -> list[tuple[int, int]]:
    """Return routed parameters and number of experts of every replaced module that has experts."""
    counts = [
        module.routed_parameters()
        for module in network.modules()
        if isinstance(module, ReplacedModule)
    ]
    return [count for count in counts if count is not None]


def parameter_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter, which represents the network's."""
    return next(network.parameters()).dtype


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def experts_per_token(network: nn.Module) -> int:
    """Return the number of experts per token from the network's config."""
    return int(text_config(network).num_experts_per_tok)


def _numel(module: nn.Module) -> int:
    stored = sum(t.numel() for t in module.parameters())
    return stored + sum(linear.numel for _, linear in packed_linears(module))


def kv_cache_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values in a cache, for text and visual tokens."""
    # By the end of attribute names, because a method's cache layer also has `visual_keys` and
    # `visual_values`; by identity, because a tensor may have two names.
    tensors = {
        id(value): value
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name.endswith(("keys", "values"))
    }
    return tensor_bytes(tensors.values())


def side_cache_bytes(cache: Cache) -> int:
    """Return the bytes of a cache that the newest token did not read, due to a method."""
    return sum(layer.side_bytes() for layer in cache.layers if hasattr(layer, "side_bytes"))
