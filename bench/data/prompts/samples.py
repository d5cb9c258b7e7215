"""Processed image prompts, ready for the forwards of a calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Processor outputs, one mapping per forward; `fingerprint` is their SHA-256."""

    inputs: tuple[Inputs, ...]
    fingerprint: str

    @staticmethod
    def of(inputs: Sequence[Inputs]) -> Samples:
        """Wrap processor outputs and hash their names, shapes, dtypes and values."""
        digest = hashlib.sha256()
        for call in inputs:
            for name in sorted(call):
                value = call[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                # Viewed as bytes first, because numpy has no bfloat16.
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return Samples(tuple(inputs), digest.hexdigest())
