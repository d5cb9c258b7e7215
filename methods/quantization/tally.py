"""Counts of bits and bytes, for the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from bench.models.packed import PackedShape


@dataclass
class Tally:
    """Number of weights before quantization, and the bits that they and their grids take now."""

    weights: int = 0
    weight_bits: int = 0
    overhead_bits: int = 0

    def add(self, weights: int, shapes: Iterable[PackedShape]) -> None:
        """Add matrices that replace `weights` weights.

        Removed weights are included in `weights` but not in `shapes`.
        """
        self.weights += weights
        for shape in shapes:
            self.weight_bits += shape.weight_bits
            self.overhead_bits += shape.overhead_bits

    def summary(self) -> dict[str, Any]:
        """Return the mean bits per weight, without and with scales, offsets and column orders."""
        total = self.weight_bits + self.overhead_bits
        return {
            "weights": self.weights,
            "weight_bits": self.weight_bits,
            "overhead_bits": self.overhead_bits,
            "mean_bits": self.weight_bits / self.weights if self.weights else 0.0,
            "mean_bits_with_overhead": total / self.weights if self.weights else 0.0,
        }


def spread(shapes: Iterable[PackedShape]) -> dict[str, int]:
    """Return the number of weights per bit width."""
    counts: Counter[int] = Counter()
    for shape in shapes:
        for block in shape.blocks():
            counts[block.bits] += block.area
    # Strings: the record is JSON, whose keys cannot be integers.
    return {str(bits): counts[bits] for bits in sorted(counts)}


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    # parameters() yields a tied tensor once, which is how often it is stored.
    held = chain(network.parameters(), network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
