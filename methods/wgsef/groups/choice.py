"""Build the groups of an image classifier that a config asks for, by kind and layer.

`filters`, `channels`, `depth` and `heads` can be removed if a trial removal succeeds
(`verification`). All other kinds are patterns within a weight, without its bias, which a dense
kernel cannot skip: they are only zeroed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from methods.wgsef.groups import convolution, residual, transformer
from methods.wgsef.groups.partition import GroupFamily, Slice, refuse_overlap
from methods.wgsef.groups.verification import mark_unremovable

ClassifierGroups = Literal[
    "filters",
    "channels",
    "filter_shapes",
    "weights",
    "depth",
    "heads",
    "rows",
    "columns",
    "blocks",
    "masks",
]


class GroupChoice(BaseModel):
    """Kinds of groups, and the layers in which each kind is used.

    `layers` maps a kind to a pattern of layer names, such as `features.*`; a kind without a pattern
    is used in all layers. `rows` and `columns` are those of a weight as a matrix [outputs, inputs].
    `blocks` are tiles of `block` rows and columns of the weight as a matrix [outputs, inputs x
    kernel positions]. `masks` is a safetensors file with an integer tensor per parameter and of its
    shape, which holds the number of each weight's group, or -1 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: tuple[ClassifierGroups, ...]
    layers: dict[ClassifierGroups, str] = Field(default_factory=dict)
    block: tuple[int, int] = (4, 4)
    masks: str | None = None

    @field_validator("block")
    @classmethod
    def _positive(cls, block: tuple[int, int]) -> tuple[int, int]:
        if min(block) < 1:
            raise ValueError(f"block={list(block)} must have at least one row and one column")
        return block

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if ("masks" in self.groups) != (self.masks is not None):
            raise ValueError("masks=FILE and groups=masks need each other: set both")
        if unused := set(self.layers) - set(self.groups):
            raise ValueError(f"layers names {unused.pop()}, which is not among groups")
        return self


def families_of(network: Classifier, choice: GroupChoice) -> list[GroupFamily]:
    """Return the chosen groups; those that can only be zeroed have an `unremovable_reason`.

    Raises:
        UserError: the network has no groups of a kind, cannot be traced, or two groups overlap.
    """
    config = network.config
    weight = next(network.parameters())
    example = weight.new_zeros(1, config.channels, config.size, config.size)
    families: list[GroupFamily] = []
    for kind in choice.groups:
        families += _of_kind(network, example, kind, choice)
    refuse_overlap(dict(network.named_parameters()), families)
    return mark_unremovable(network, families, example)


def _of_kind(
    network: Classifier, example: Tensor, kind: ClassifierGroups, choice: GroupChoice
) -> list[GroupFamily]:
    if kind == "masks":
        assert choice.masks is not None
        return [masks(network, Path(choice.masks))]
    pattern = choice.layers.get(kind, "*")
    if kind == "depth":
        # Returned here: its single family has no layer name that the filter below could match.
        return residual.depth(network, example, pattern)
    if kind == "heads":
        found = transformer.attention_heads(network)
    elif kind in PATTERNS:
        found = patterns(network, example, kind, choice.block, pattern)
    else:
        found = _OF_CONVOLUTIONS[kind](network, example)
    chosen = [family for family in found if fnmatchcase(_layer_of(family), pattern)]
    if not chosen:
        raise UserError(f"layers.{kind}={pattern} matches no layer with {kind}")
    return chosen


_OF_CONVOLUTIONS: dict[ClassifierGroups, Callable[[nn.Module, Tensor], list[GroupFamily]]] = {
    "filters": convolution.filters,
    "channels": convolution.channels,
    "filter_shapes": convolution.filter_shapes,
    "weights": convolution.weights,
}


def _layer_of(family: GroupFamily) -> str:
    return family.name.removeprefix("readers of ")


PATTERNS: tuple[ClassifierGroups, ...] = ("rows", "columns", "blocks")


def patterns(
    network: nn.Module,
    example: Tensor,
    kind: ClassifierGroups,
    block: tuple[int, int],
    layers: str = "*",
) -> list[GroupFamily]:
    """Return rows, columns or tiles of the weights of the layers whose names match a pattern.

    The layer that computes the logits is left out.

    Raises:
        UserError: the size of a weight is not a multiple of the tile size.
    """
    found = []
    logits = convolution.last_layer(network, example)
    for name, module in network.named_modules():
        if not isinstance(module, convolution.PRUNABLE_LAYERS) or module is logits:
            continue
        # Filtered here, because tiles may not fit the layers that the pattern leaves out.
        if not fnmatchcase(name, layers):
            continue
        weight = module.get_parameter("weight")
        if kind == "blocks":
            owned = _tiles(f"{name}.weight", weight, block)
        else:
            axis = 0 if kind == "rows" else 1
            owned = Slice.whole(f"{name}.weight", (axis,), weight.shape[axis])
        count = 1 + int(owned.groups.max())
        reason = f"{kind} of a weight are only zeroed, since a dense kernel cannot skip them"
        found.append(GroupFamily(name, kind, count, (owned,), unremovable_reason=reason))
    return found


def _tiles(tensor: str, weight: Tensor, block: tuple[int, int]) -> Slice:
    outputs, inputs = len(weight), weight[0].numel()
    if outputs % block[0] or inputs % block[1]:
        raise UserError(
            f"block={list(block)} does not divide {tensor} of {outputs} x {inputs}: choose a "
            "smaller one, or the layers with layers.blocks=PATTERN"
        )
    tile_O = torch.arange(outputs) // block[0]
    tile_I = torch.arange(inputs) // block[1]
    group_OI = tile_O[:, None] * (inputs // block[1]) + tile_I
    axes = tuple(range(weight.ndim))
    return Slice(tensor, axes, torch.arange(outputs * inputs), group_OI.flatten())


def masks(network: nn.Module, file: Path) -> GroupFamily:
    """Return the groups that a file of index masks describes, as one family.

    Raises:
        UserError: the file cannot be read, or a mask does not fit its parameter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"masks={file} cannot be read as safetensors: {error}") from error
    parameters = dict(network.named_parameters())
    owned = []
    for name, mask in given.items():
        if name not in parameters:
            raise UserError(f"masks={file}: {type(network).__name__} has no parameter {name}")
        weight = parameters[name]
        if mask.shape != weight.shape:
            raise UserError(
                f"masks={file}: the mask of {name} has the shape {list(mask.shape)}, the "
                f"parameter {list(weight.shape)}"
            )
        if mask.dtype.is_floating_point or mask.dtype.is_complex or mask.dtype == torch.bool:
            raise UserError(f"masks={file}: the mask of {name} is {mask.dtype}; give integers")
        flat = mask.flatten().long()
        units = (flat >= 0).nonzero().flatten()
        owned.append(Slice(name, tuple(range(weight.ndim)), units, flat[units]))
    numbers = torch.cat([part.groups for part in owned]) if owned else torch.empty(0)
    if not len(numbers):
        raise UserError(f"masks={file} has no weight in a group: all numbers are negative")
    # The file's numbers may have gaps; groups are numbered without gaps.
    known = numbers.unique()
    parts = tuple(
        Slice(p.tensor, p.axes, p.units, torch.searchsorted(known, p.groups))
        for p in owned
        if len(p.units)
    )
    reason = "groups of a mask are only zeroed, since a dense kernel cannot skip them"
    return GroupFamily("masks", "masks", len(known), parts, unremovable_reason=reason)


@dataclass(frozen=True)
class FamilyOutline:
    """A family of groups without its tensors; `normalised` if it owns a scale of BatchNorm."""

    name: str
    kind: str
    groups: int
    unremovable_reason: str | None
    normalised: bool


def outlines(config: VisionConfig, choice: GroupChoice) -> tuple[FamilyOutline, ...]:
    """Return the families of a network with this config, for checks before weights are loaded.

    Raises:
        UserError: see `families_of`.
    """
    # JSON is the cache key, because the configs are not hashable.
    return _cached_outlines(config.model_dump_json(), choice.model_dump_json())


# Building and tracing a network is slow, and every job of a sweep checks its budget against the
# same few configs.
@functools.lru_cache(maxsize=32)
def _cached_outlines(config: str, choice: str) -> tuple[FamilyOutline, ...]:
    # Initialising weights draws random numbers; a check must not shift the random state of the run.
    with torch.random.fork_rng(devices=[]):
        network = build_classifier(VisionConfig.model_validate_json(config))
    chosen = GroupChoice.model_validate_json(choice)
    norms = {n for n, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    scales = {f"{name}.weight" for name in norms}
    return tuple(
        FamilyOutline(
            family.name,
            family.kind,
            family.groups,
            family.unremovable_reason,
            any(owned.tensor in scales for owned in family.owned_slices),
        )
        for family in families_of(network, chosen)
    )


def refuse_unfit_pattern(
    families: Sequence[GroupFamily | FamilyOutline], kept: int, of: int
) -> None:
    """Raise if the number of groups of a family is not a multiple of the pattern's length."""
    for family in families:
        if family.groups % of:
            raise UserError(
                f"pattern=[{kept},{of}] does not fit the {family.groups} {family.kind} of "
                f"{family.name}: leave it out with layers, or choose another pattern"
            )
