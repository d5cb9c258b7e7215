"""Prompts with images, written and encoded by a model's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from bench.data.prompts import chat
from bench.models.model import Model


class Prompts:
    """Renders and encodes single questions, preceded by `system` unless it is empty."""

    def __init__(self, model: Model, system: str | None) -> None:
        self._processor = model.processor
        self._system = system

    def render(self, question: str, images: int) -> str:
        """Return the full prompt, up to where the answer begins."""
        return chat.render(self._processor, [(question, None)], images=images, system=self._system)

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the processor's output for one prompt."""
        return chat.encode(self._processor, [prompt], [images])


def image_hash(images: Sequence[Image.Image]) -> str:
    """Return a SHA-256 over the pixels of a question's images, in order."""
    digest = hashlib.sha256()
    for image in images:
        # Mode and size too: the same bytes may be images of different shapes.
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
