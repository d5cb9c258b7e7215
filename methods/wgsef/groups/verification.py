"""Trial removal of groups: find out which families of groups can really be removed.

A tracer can misread a network whose channels are shuffled, split over groups, normalised together
or mixed by attention. Its result is therefore tested on a copy with random weights: one group of
every family is zeroed in one network and removed from another, and their outputs must agree. A
family that fails is still trained and zeroed but never removed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.errors import UserError, error_sentence
from methods.wgsef.groups.partition import GroupFamily, Slice, reshape_units, unit_count
from methods.wgsef.removal import remove_groups

TOLERANCE = 1e-8
"""Largest allowed difference of the outputs, relative to the largest output, in fp64."""

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError)
"""What a forward raises if the shapes of its layers do not match."""


def mark_unremovable(
    network: nn.Module, families: Sequence[GroupFamily], example: Tensor
) -> list[GroupFamily]:
    """Return the families, with the reason filled in for those that cannot be removed.

    Raises:
        UserError: a family names weights that the network does not have.
    """
    _refuse_unfit_slices(network, families)
    trial, image = with_random_weights(network, example)
    candidates = [family for family in families if family.unremovable_reason is None]
    # Nearly every network passes with all families at once, which takes two forwards.
    if _reason(trial, candidates, image) is None:
        return list(families)
    marked = []
    for family in families:
        reason = family.unremovable_reason or _reason(trial, [family], image)
        marked.append(replace(family, unremovable_reason=reason))
    removable = [family for family in marked if family.unremovable_reason is None]
    if reason := _reason(trial, removable, image):
        return [replace(f, unremovable_reason=f.unremovable_reason or reason) for f in marked]
    return marked


def _reason(network: nn.Module, families: Sequence[GroupFamily], image: Tensor) -> str | None:
    """Return why these families cannot be removed from a network, or None if they can."""
    tried = [family for family in families if family.groups > 1 or family.kind == "depth"]
    if not tried:
        return None
    zeroed = copy.deepcopy(network)
    dead = []
    for family in tried:
        # The last group reveals wrong offsets, under which group 0 often still maps to itself. Each
        # residual block is different, so all of them are tried.
        dead_M = torch.full((family.groups,), family.kind == "depth")
        dead_M[-1] = True
        dead.append(dead_M)
        for part in family.owned_slices:
            _zero(zeroed.get_parameter(part.tensor), part, dead_M)
    try:
        smaller = remove_groups(zeroed, tried, dead).network
        with torch.no_grad():
            expected, actual = zeroed(image), smaller(image)
    except (*FORWARD_ERRORS, UserError) as error:
        return f"without them its forward fails ({error_sentence(error)})"
    difference = float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-300))
    # Written so that NaN counts as a disagreement.
    return None if difference <= TOLERANCE else "without them its outputs change"


def _zero(weight: Tensor, part: Slice, dead_M: Tensor) -> None:
    units = part.units_of(dead_M)
    with torch.no_grad():
        if not part.axes:
            weight.mul_(0.0 if len(units) else 1.0)
            return
        dead_U = torch.zeros(unit_count(weight.shape, part.axes), dtype=torch.bool)
        dead_U[units] = True
        weight.masked_fill_(reshape_units(dead_U, weight.shape, part.axes), 0.0)


def with_random_weights(network: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a fp64 copy on the CPU without constant weights or statistics, and a random input."""
    # Fresh BatchNorms shift by 0 and scale by 1, which would hide many wrong couplings.
    trial = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    for weight in trial.parameters():
        # Most weights are random already. Constant are the shifts and scales of norms, a vision
        # transformer's head of zeros (with which every trial would pass), and ConvNeXt's layer
        # scales of 1e-6.
        if weight.ndim == 1 or bool((weight == weight.flatten()[0]).all()):
            weight.add_(0.1 * noise(weight))
    for module in trial.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(0.1 * noise(module.running_mean))
    return trial, noise(example)


def _refuse_unfit_slices(network: nn.Module, families: Sequence[GroupFamily]) -> None:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for family in families:
        for part in (*family.owned_slices, *family.reader_slices):
            shape = tensors[part.tensor].shape if part.tensor in tensors else None
            fits = shape is not None and all(axis < len(shape) for axis in part.axes)
            if shape is None or not fits or int(part.units.max()) >= unit_count(shape, part.axes):
                raise UserError(
                    f"{type(network).__name__}: the {family.kind} of {family.name} are not "
                    f"understood, since {part.tensor} does not have their channels; choose other "
                    "groups, such as groups=weights"
                )
