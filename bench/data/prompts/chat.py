"""Conversations about images as a model's own processor writes and encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The conversation of LLaVA-1.5, for a processor that has none of its own."""

Turn = tuple[str, str | None]
"""A question and its answer; None where the answer is still to come."""


def render(processor: Any, turns: Sequence[Turn], *, images: int, system: str | None) -> str:
    """Return a conversation whose first question comes after its images.

    It ends where the last answer begins, or after it where it is given; `system` goes before all.
    """
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] * images if number == 0 else []
        asked = [*shown, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": asked})
        if answer is not None:
            said = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": said})
    text: str = processor.apply_chat_template(
        messages,
        chat_template=getattr(processor, "chat_template", None) or VICUNA,
        tokenize=False,
        add_generation_prompt=turns[-1][1] is None,
    )
    return text


def encode(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image]], **options: Any
) -> dict[str, Any]:
    """Return what the processor makes of rendered conversations; a BOS is never written twice."""
    begin = processor.tokenizer.bos_token
    if begin and all(text.startswith(begin) for text in texts):
        options["add_special_tokens"] = False
    if any(images):
        options["images"] = [list(shown) for shown in images]
    return dict(processor(text=list(texts), return_tensors="pt", **options))
