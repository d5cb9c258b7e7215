"""Questions with images as a model's own processor writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from bench.data.prompts import chat
from bench.models.model import Model


class Prompts:
    """Renders and encodes single questions; `system` goes before them if it is not empty."""

    def __init__(self, model: Model, system: str | None) -> None:
        self._processor = model.processor
        self._system = system

    def render(self, question: str, images: int) -> str:
        """Return the whole prompt, up to where the answer begins."""
        return chat.render(self._processor, [(question, None)], images=images, system=self._system)

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return what the processor makes of one prompt."""
        return chat.encode(self._processor, [prompt], [images])


def image_hash(images: Sequence[Image.Image]) -> str:
    """Return a SHA-256 over the pixels of a question's images, in order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
