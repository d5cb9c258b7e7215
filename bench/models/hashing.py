"""Fingerprints of weight files, and hash and validity of a network's current weights.

A file is read once: its digest is cached in the user's cache folder under the file's path, size and
modification time. Files of the Hugging Face cache are already named by their SHA-256. Hash and
validity read every weight once where it is stored; offloaded ones are loaded one at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.offload import iter_parameters

SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(files: Iterable[Path]) -> str:
    """Hash the names and digests of files, independent of their order."""
    lines = sorted(f"{file.name} {digest(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, from its blob name or the cache if known there."""
    real = file.resolve()
    # The hub names LFS blobs by their SHA-256. Small files have a git SHA-1 of 40 digits instead,
    # which the pattern rejects.
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name
    # mtime in nanoseconds and size detect a rewritten file. A file replaced within one tick of the
    # clock by one of equal size would go unnoticed; hashing tens of gigabytes per run is the
    # alternative.
    state = real.stat()
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()
    remembered = _digest_cache() / key
    try:
        known = remembered.read_text()
        # A cache file that was truncated by a full disk is treated as absent.
        if SHA256.fullmatch(known):
            return known
    except OSError:
        pass
    with real.open("rb") as stream:
        computed = hashlib.file_digest(stream, "sha256").hexdigest()
    _write_digest(remembered, computed)
    return computed


def _digest_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimbench" / "digests"


def _write_digest(place: Path, value: str) -> None:
    """Write a digest atomically; without a writable cache it is recomputed next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of a sweep share the cache: rename is atomic, so that a reader sees the whole digest
        # or none.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as stream:
            stream.write(value)
        Path(stream.name).replace(place)
    except OSError:
        pass


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
    """Raise if a method left NaN or infinity in a weight, before anything is scored."""
    for name, weight in _named_weights(network):
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(f"method {method} left numbers in {name} that are NaN or infinite")


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
