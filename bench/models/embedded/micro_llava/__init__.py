"""micro_llava: a small LLaVA that answers questions about drawn scenes, and its recipe."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder of the model, for ``from_pretrained``."""
