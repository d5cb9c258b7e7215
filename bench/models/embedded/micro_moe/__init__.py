"""micro_moe: a small Qwen2-MoE language model of the closed world, and its recipe."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder of the model, for ``from_pretrained``."""
