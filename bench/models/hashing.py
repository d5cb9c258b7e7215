"""Hash of a network's current weights, and a check that they are finite.

Every weight is read once from where it is stored; offloaded weights are loaded one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.offload import iter_parameters

# Chunks bound the memory for int64 copies: a whole bfloat16 weight would need four times its size.
_CHUNK = 2**22
_GOLDEN_MULTIPLIER = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64
_INT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def network_hash(network: nn.Module) -> str:
    """Hash all weights and buffers: equal bits give equal hashes.

    Sums are computed on the weights' own device and only the sums are copied to the CPU, so that
    tens of gigabytes take seconds.
    """
    digest_of_all = hashlib.sha256()
    for name, tensor in _named_tensors(network):
        digest_of_all.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {_weighted_bit_sum(tensor)}\n".encode()
        )
    return digest_of_all.hexdigest()


def refuse_not_finite(network: nn.Module, method: str) -> None:
    """Raise before scoring if a method left NaN or infinity in a weight, or NaN in a buffer."""
    for name, weight in _named_weights(network):
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(f"method {method} left numbers in {name} that are NaN or infinite")
    for name, buffer in network.named_buffers():
        # Masks contain infinity. Statistics of a batch norm matter as much as its weights.
        if buffer.is_floating_point() and not buffer.is_meta and bool(buffer.isnan().any()):
            raise UserError(f"method {method} left numbers in {name} that are NaN")


def _named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = (name for name, _ in network.named_parameters())
    yield from zip(names, iter_parameters(network), strict=True)


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _named_weights(network)
    # Buffers on the meta device have no values.
    yield from ((name, buffer) for name, buffer in network.named_buffers() if not buffer.is_meta)


@torch.no_grad()
def _weighted_bit_sum(tensor: Tensor) -> int:
    """Sum a tensor's bits as integers modulo 2^64, each weighted by its position."""
    # An integer view of the same size compares bits instead of numbers: -0.0 and 0.0 differ, NaN
    # equals itself, and no rounding depends on the device.
    flat = tensor.detach().contiguous().flatten()
    words = flat.view(_INT_DTYPES[flat.element_size()])
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        # int64 arithmetic wraps modulo 2^64, as intended. Odd factors are invertible modulo 2^64,
        # so a change of one word always changes the sum; factors that depend on the position detect
        # swaps as well. Hashing the bytes would need all of them on the CPU.
        total += int((part * (place * _GOLDEN_MULTIPLIER).bitwise_or(1)).sum())
    return total % 2**64
