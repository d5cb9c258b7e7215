"""Hash and validity of a network's current weights.

Every weight is read once where it is stored; offloaded ones are loaded one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.offload import iter_parameters

# Chunks bound the int64 copies: a whole weight in int64 would take four times its bfloat16 size.
_CHUNK = 2**22
_GOLDEN_MULTIPLIER = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64
_INT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_hash(network: nn.Module) -> str:
    """Hash all weights and buffers: equal bits give equal hashes.

    Sums are computed on the weights' own device and only they are copied to the CPU, so that tens
    of gigabytes take seconds.
    """
    digest_of_all = hashlib.sha256()
    for name, tensor in _named_tensors(network):
        digest_of_all.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {_weighted_bit_sum(tensor)}\n".encode()
        )
    return digest_of_all.hexdigest()


def refuse_not_finite(network: nn.Module, method: str) -> None:
    """Raise if a method left NaN or infinity in a weight or NaN in a buffer, before scoring."""
    for name, weight in _named_weights(network):
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(f"method {method} left numbers in {name} that are NaN or infinite")
    for name, held in network.named_buffers():
        # Masks hold infinity. The statistics of a batch norm decide as much as its weights.
        if held.is_floating_point() and not held.is_meta and bool(held.isnan().any()):
            raise UserError(f"method {method} left numbers in {name} that are NaN")


def _named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = (name for name, _ in network.named_parameters())
    yield from zip(names, iter_parameters(network), strict=True)


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _named_weights(network)
    # Buffers on meta have no bits to hash.
    yield from ((name, held) for name, held in network.named_buffers() if not held.is_meta)


@torch.no_grad()
def _weighted_bit_sum(tensor: Tensor) -> int:
    """Sum a tensor's bits as integers modulo 2^64, each weighted by its position."""
    # A view as integers of the same size sees bits, not numbers: -0.0 and 0.0 differ, NaN is equal
    # to itself, and no rounding depends on the device.
    flat = tensor.detach().contiguous().flatten()
    words = flat.view(_INT_DTYPES[flat.element_size()])
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        # int64 arithmetic wraps modulo 2^64, which is the ring intended here. Odd factors are
        # invertible in it, so a change of one word always changes the sum; factors that depend on
        # the position expose swaps as well. Hashing the bytes themselves would need all of them on
        # the CPU.
        total += int((part * (place * _GOLDEN_MULTIPLIER).bitwise_or(1)).sum())
    return total % 2**64
