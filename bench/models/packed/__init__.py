"""Weights stored as codes of a few bits, in modules that compute with them and can be saved."""

from bench.models.packed.linear import PackedLinear, packed_linears
from bench.models.packed.modules import PackedExpert, PackedExperts
from bench.models.packed.rebuilding import describe, install
from bench.models.packed.shape import Level, PackedShape

__all__ = [
    "Level",
    "PackedExpert",
    "PackedExperts",
    "PackedLinear",
    "PackedShape",
    "describe",
    "install",
    "packed_linears",
]
