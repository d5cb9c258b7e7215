"""Prompts with images for calibration: resolved and hashed first, then processed to tensors."""

from bench.data.prompts.config import PromptsConfig
from bench.data.prompts.samples import Samples
from bench.data.prompts.source import PromptSource, prefetch, resolve

__all__ = ["PromptSource", "PromptsConfig", "Samples", "prefetch", "resolve"]
