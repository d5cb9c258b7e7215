"""Removal of dead groups from classifiers and language models: a smaller network, same outputs.

Shapes: M groups of a family.

transformers builds all layers of a language model from one config. A model can therefore be
exported only if all layers keep the same number of neurons or heads (scope `layer`); other models
can only be run in this process.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.classifiers.classifier import Classifier
from bench.models.classifiers.pruned_modules import (
    PrunedAttention,
    Shortcut,
    prune_attention,
    reduce_to_shortcut,
)
from bench.models.structure.dense_layer import (
    find_heads,
    is_projection,
    state_head_groups,
    state_width,
)
from methods.wgsef.groups.partition import GroupFamily


@dataclass(frozen=True)
class Removal:
    """The smaller network, and how it differs from the original.

    `shapes` are the new weight shapes of the layers that changed, `shortcuts` replace the removed
    residual blocks, and `kept` is the number of groups left in each family, after rounding.
    """

    network: nn.Module
    shapes: dict[str, tuple[int, ...]]
    shortcuts: tuple[Shortcut, ...]
    kept: dict[str, int]


def remove_groups(
    network: nn.Module, families: Sequence[GroupFamily], dead: Sequence[Tensor], multiple: int = 1
) -> Removal:
    """Return a copy of the network without the groups that `dead` marks, one [M] per family.

    Each family keeps at least one group. The number of groups kept is rounded up to a `multiple` (8
    or 64 suit most kernels), at most to all groups of the family, by keeping some zero groups.

    Raises:
        UserError: groups of this kind cannot be removed, or a dead group is not zero.
    """
    _refuse_unremovable(network, families, dead)
    return _cut_groups(copy.deepcopy(network), families, dead, multiple)


def _cut_groups(
    smaller: nn.Module, families: Sequence[GroupFamily], dead: Sequence[Tensor], multiple: int = 1
) -> Removal:
    """Cut the groups out of the network itself."""
    removed_units: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    shortcuts: list[Shortcut] = []
    kept = {}
    for family, dead_M in zip(families, dead, strict=True):
        if family.kind == "depth":
            removed_M = dead_M
            pairs = zip(family.shortcuts, dead_M.tolist(), strict=True)
            shortcuts += [shortcut for shortcut, is_dead in pairs if is_dead]
        else:
            removed_M = _round_up_kept(dead_M, multiple)
            for part in (*family.owned_slices, *family.reader_slices):
                # Indices are collected first and cut once per tensor and axis, because cutting
                # family by family would shift the units of the next family.
                removed_units[part.tensor, part.axes[0]].append(part.units_of(removed_M))
        kept[family.name] = int((~removed_M).sum())
    layers = _delete_units(smaller, removed_units)
    shapes = {name: _shape_of(smaller.get_submodule(name)) for name in layers}
    for shortcut in shortcuts:
        reduce_to_shortcut(smaller, shortcut)
    return Removal(smaller, shapes, tuple(shortcuts), kept)


def _refuse_unremovable(
    network: nn.Module, families: Sequence[GroupFamily], dead: Sequence[Tensor]
) -> None:
    """Raise for groups that cannot be removed or whose weights are not zero."""
    tensors = dict(network.named_parameters())
    for family, dead_M in zip(families, dead, strict=True):
        if family.unremovable_reason is not None and bool(dead_M.any()):
            raise UserError(
                f"the {family.kind} of {family.name} stay zeroed: {family.unremovable_reason}"
            )
        for part in family.owned_slices:
            units = part.units_of(dead_M)
            if part.axes:
                living = tensors[part.tensor].detach().movedim(part.axes[0], 0)[units]
            else:
                # Without axes the tensor is a single unit: the factor is 1 if its group is dead,
                # else 0.
                living = tensors[part.tensor].detach() * len(units)
            if bool(living.any()):
                raise UserError(f"{family.name} has a group marked dead whose weights are not zero")


def _round_up_kept(dead_M: Tensor, multiple: int) -> Tensor:
    """Return the groups to remove so that a multiple is kept; the first dead groups stay."""
    alive = int((~dead_M).sum())
    target = min(len(dead_M), max(1, math.ceil(alive / multiple)) * multiple)
    # The number of each dead group among the dead ones, from 1.
    number_M = dead_M.int().cumsum(0)
    return dead_M & (number_M > target - alive)


def _delete_units(
    network: nn.Module, removed_units: dict[tuple[str, int], list[Tensor]]
) -> list[str]:
    """Delete units per (tensor, axis), and return the names of the layers that shrank."""
    layers: dict[str, None] = {}
    for (tensor, axis), parts in removed_units.items():
        name, _, key = tensor.rpartition(".")
        layer = network.get_submodule(name)
        old = getattr(layer, key)
        removed = torch.zeros(old.shape[axis], dtype=torch.bool, device=old.device)
        removed[torch.cat(parts).to(old.device)] = True
        if not bool(removed.any()):
            continue
        new = old.detach().index_select(axis, (~removed).nonzero()[:, 0])
        if isinstance(old, nn.Parameter):
            setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            # BatchNorm's running statistics shrink with its weights.
            layer.register_buffer(key, new)
        layers[name] = None
    for name in layers:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.MultiheadAttention):
            prune_attention(network, name)
        else:
            _update_layer_sizes(layer)
    return list(layers)


def _shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of the weight that determines a layer's sizes."""
    key = "in_proj_weight" if isinstance(layer, PrunedAttention) else "weight"
    return tuple(layer.get_parameter(key).shape)


def _update_layer_sizes(layer: nn.Module) -> None:
    """Make a layer's own size attributes agree with its weight."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            # A depthwise convolution stays depthwise: one group per remaining channel.
            layer.groups = layer.weight.shape[0]
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif is_projection(layer):
        conv: Any = layer  # GPT-2's linear layer, stored transposed
        conv.nx, conv.nf = conv.weight.shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = layer.weight.shape[0]


def smaller_classifier(
    network: Classifier, families: Sequence[GroupFamily], dead: Sequence[Tensor], multiple: int = 1
) -> Classifier:
    """Return the classifier without its dead groups; `save_classifier` can write it.

    Raises:
        UserError: the groups cannot be removed; see `remove_groups`.
    """
    removal = remove_groups(network, families, dead, multiple)
    smaller = removal.network
    assert isinstance(smaller, Classifier)
    config = network.config
    # The network may have been pruned before. Earlier shapes stay valid where this removal changed
    # nothing, except for modules that it removed.
    changed = {**config.shapes, **removal.shapes}
    modules = {name for name, _ in smaller.named_modules()}
    shapes = {name: shape for name, shape in changed.items() if name in modules}
    removed = (*config.removed, *removal.shortcuts)
    smaller.config = config.model_copy(update={"shapes": shapes, "removed": removed})
    return smaller


def shrink_language_model(
    network: nn.Module, families: Sequence[GroupFamily], dead: Sequence[Tensor]
) -> None:
    """Cut the dead neurons or heads out of the model in place, without a second copy in memory.

    If all layers keep the same number, the config is updated and `save_pretrained` can write the
    model. Otherwise the config stays as it was, and the model can only be run.

    Raises:
        UserError: the groups are of different kinds or cannot be removed, or transformers could not
            load a model of this size. Nothing is cut in these cases.
    """
    kinds = {family.kind for family in families}
    if len(kinds) != 1:
        raise UserError(f"only one kind of group can be removed, got {' and '.join(sorted(kinds))}")
    _refuse_unremovable(network, families, dead)
    counts = [int((~dead_M).sum()) for dead_M in dead]
    # In a vision-language model the decoder's sizes are in a nested config.
    config: Any = cast(Any, network).config.get_text_config()
    if len(set(counts)) == 1:
        if kinds == {"heads"}:
            refuse_unloadable_heads(config, counts[0])
        else:
            _refuse_unloadable_config(config, f"{counts[0]} {next(iter(kinds))} per layer")
        if kinds == {"heads"}:
            _set_head_counts(config, counts[0])
        else:
            state_width(network, counts[:1])
    _cut_groups(network, families, dead)
    if kinds == {"heads"}:
        for family, count in zip(families, counts, strict=True):
            (heads,) = find_heads(network.get_submodule(family.name))
            state_head_groups(heads, count)


def refuse_unloadable_heads(config: Any, kv_heads: int) -> None:
    """Raise if transformers could not load a model that keeps this number of KV heads per layer."""
    _refuse_unstated_heads(config)
    stated = copy.deepcopy(config)
    _set_head_counts(stated, kv_heads)
    _refuse_unloadable_config(stated, f"{kv_heads} heads per layer")


def _set_head_counts(config: Any, kv_heads: int) -> None:
    """Set the numbers of KV and query heads, and the head width, in the config."""
    # Without an explicit head_dim, transformers derives it as hidden_size / num_attention_heads,
    # which is wrong as soon as heads are removed.
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    config.head_dim = width
    config.num_key_value_heads = kv_heads
    config.num_attention_heads = kv_heads * queries


def _refuse_unstated_heads(config: Any) -> None:
    """Raise if a config cannot describe a model from which heads have been removed."""
    if not hasattr(config, "num_key_value_heads"):
        raise UserError(
            f"a config of {config.model_type} derives the width of a head from the number of "
            "heads, so it cannot state fewer heads: use state=zeroed"
        )


def _refuse_unloadable_config(config: Any, what: str) -> None:
    """Raise if transformers' own config validation would refuse this config on loading."""
    try:
        # `validate` exists only in versions whose configs are strict dataclasses.
        getattr(config, "validate", lambda: None)()
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"transformers could not reload {what}: {reason}; choose a different ratio, or "
            "state=zeroed"
        ) from error
