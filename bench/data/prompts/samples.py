"""Prompts with images as calibration material: what a processor returned, ready for the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Processor outputs, one mapping a call; `fingerprint` is a SHA-256 over exactly these."""

    inputs: tuple[Inputs, ...]
    fingerprint: str

    @staticmethod
    def of(inputs: Sequence[Inputs]) -> Samples:
        """Take calls as they are and hash names, shapes and values."""
        digest = hashlib.sha256()
        for call in inputs:
            for name in sorted(call):
                value = call[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return Samples(tuple(inputs), digest.hexdigest())
