"""micro_moe: a small Qwen2-MoE language model of the closed world, and the recipe it is from."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the model is: ``from_pretrained`` takes this folder."""
