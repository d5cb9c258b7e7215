"""Structure of a network: its decoder layers and MoE blocks."""

from bench.models.anatomy.dissection import Anatomy, dissect
from bench.models.anatomy.expert import ExpertView
from bench.models.anatomy.moe import MoEBlock

__all__ = ["Anatomy", "ExpertView", "MoEBlock", "dissect"]
