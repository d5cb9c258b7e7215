"""What a network's weights are now, after methods changed them: one name, and whether all is well.

Both read every weight once where it lies; offloaded ones are fetched one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.residence import fetched

_CHUNK = 2**22
_SPREAD = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_hash(network: nn.Module) -> str:
    """Return a name for the state of all weights and buffers: equal for equal bits.

    Sums are taken on the weights' own device and only they are brought to the CPU, so that tens of
    gigabytes take seconds.
    """
    found = hashlib.sha256()
    for name, tensor in _tensors(network):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum(tensor)}\n".encode())
    return found.hexdigest()


def refuse_not_finite(network: nn.Module, method: str) -> None:
    """Raise if a method left a weight with NaN or infinity in it, before anything is scored."""
    for name, weight in _weights(network):
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(f"method {method} left numbers in {name} that are NaN or infinite")


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = (name for name, _ in network.named_parameters())
    yield from zip(names, fetched(network), strict=True)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _weights(network)
    yield from ((name, held) for name, held in network.named_buffers() if not held.is_meta)


@torch.no_grad()
def _sum(tensor: Tensor) -> int:
    """Add up a tensor's bits as whole numbers modulo 2^64, each times an odd number of its place.

    So no change of a single number and no exchange of two goes unseen.
    """
    flat = tensor.detach().contiguous().flatten()
    words = flat.view(_WORDS[flat.element_size()])
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        total += int((part * (place * _SPREAD).bitwise_or(1)).sum())
    return total % 2**64
