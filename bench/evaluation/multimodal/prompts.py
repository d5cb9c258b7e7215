"""Questions with images as a model's own processor writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from bench.models.model import Model

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The conversation of LLaVA-1.5, for a processor that has none of its own."""


class Prompts:
    """Renders and encodes single questions; `system` goes before them if it is not empty."""

    def __init__(self, model: Model, system: str | None) -> None:
        self._processor = model.processor
        self._system = system
        own = getattr(self._processor, "chat_template", None)
        self._template = own or VICUNA

    def render(self, question: str, images: int) -> str:
        """Return the whole prompt, up to where the answer begins."""
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if self._system:
            said = [{"type": "text", "text": self._system}]
            messages.insert(0, {"role": "system", "content": said})
        text: str = self._processor.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return what the processor makes of one prompt; a BOS is never written twice."""
        begin = self._processor.tokenizer.bos_token
        options: dict[str, Any] = {}
        if begin and prompt.startswith(begin):
            options["add_special_tokens"] = False
        if images:
            options["images"] = list(images)
        return dict(self._processor(text=[prompt], return_tensors="pt", **options))


def image_hash(images: Sequence[Image.Image]) -> str:
    """Return a SHA-256 over the pixels of a question's images, in order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
