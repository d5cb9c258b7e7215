"""Density-peak clustering for token recycling (SparseVLM, ICML 2025).

Shapes: I frames, M tokens of a frame, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.token_pruning.ranking import best


def clusters(x_IMD: Tensor, member_IM: Tensor, count_I: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster each frame's members into `count` clusters; return centres and owners.

    Distances are Euclidean over √D. A member's density is exp(- mean d² to its `count` nearest
    members, itself included); its isolation is the distance to the nearest member of higher
    density, or the largest distance for the densest. Centres (bool [I, M]) have the highest product
    of both; every other member belongs to its nearest centre. Owners [I, M] are positions of
    centres.
    """
    distance_IMM = torch.cdist(x_IMD.float(), x_IMD.float()) / x_IMD.shape[-1] ** 0.5
    pair_IMM = member_IM[:, :, None] & member_IM[:, None, :]
    sorted_IMM = distance_IMM.masked_fill(~pair_IMM, torch.inf).sort(dim=2).values
    nearest_I = count_I.clamp(min=1).minimum(member_IM.sum(dim=1).clamp(min=1))
    place_I = (nearest_I - 1)[:, None, None].expand(-1, x_IMD.shape[1], 1)
    # Sorting puts pairs with non-members (inf) last, so the k nearest members are a prefix whose
    # mean a cumulative sum gives for every k at once: k differs between frames.
    mean_IM = sorted_IMM.square().cumsum(dim=2).gather(2, place_I)[..., 0] / nearest_I[:, None]
    density_IM = (-mean_IM).exp()
    denser_IMM = (density_IM[:, None, :] > density_IM[:, :, None]) & pair_IMM
    farthest_I = distance_IMM.masked_fill(~pair_IMM, 0).flatten(1).amax(dim=1)
    # The densest member has no denser one and gets inf here, which the next line bounds by the
    # largest distance in the frame.
    apart_IM = distance_IMM.masked_fill(~denser_IMM, torch.inf).amin(dim=2)
    apart_IM = torch.minimum(apart_IM, farthest_I[:, None])
    centre_IM = best(density_IM * apart_IM, member_IM, count_I)
    owner_IM = distance_IMM.masked_fill(~centre_IM[:, None, :], torch.inf).argmin(dim=2)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    return centre_IM, torch.where(centre_IM, itself_M, owner_IM)


def summed(x_IMD: Tensor, member_IM: Tensor, owner_IM: Tensor) -> Tensor:
    """Sum the tokens of each cluster at the position of its centre, [I, M, D]."""
    index_IMD = owner_IM[..., None].expand_as(x_IMD)
    parts_IMD = torch.where(member_IM[..., None], x_IMD, 0)
    return torch.zeros_like(x_IMD).scatter_add(1, index_IMD, parts_IMD)
