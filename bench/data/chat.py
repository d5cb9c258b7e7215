"""Conversations about images, rendered and encoded by a model's own processor.

transformers has no types for its tokenizers and processors, so Protocols name the members in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bench.data.image_files import UnfitImage
from bench.errors import UserError, error_sentence

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Tokenizer(Protocol):
    """Encodes text as token ids."""

    padding_side: str
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    all_special_tokens: list[str]

    def __hash__(self) -> int: ...

    def __call__(
        self, text: str, *, verbose: bool = True, add_special_tokens: bool = True
    ) -> Mapping[str, list[int]]:
        """Return the ids of a text as `input_ids`; `verbose` warns if it is long."""

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, including added ones."""


class Processor(Protocol):
    """Converts images and text to inputs of a vision-language model."""

    tokenizer: Tokenizer

    def __call__(self, *, text: list[str], return_tensors: str, **options: object) -> ModelInputs:
        """Return tensors by the names of the model's arguments."""

    def apply_chat_template(self, conversation: Sequence[ChatMessage], **options: object) -> str:
        """Return the text of a conversation."""


ModelInputs = Mapping[str, "Tensor"]

# `role`, and `content`: a list of parts with a `type` and, for text, the `text`.
ChatMessage = dict[str, str | list[dict[str, str]]]


# Chat template of LLaVA-1.5, used for processors that have none.
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# A question and its answer, which is None if the model has to generate it.
Turn = tuple[str, str | None]


class Conversation(NamedTuple):
    """An image with (question, answer) turns about it."""

    image: Image
    turns: list[tuple[str, str]]


def render_chat(
    processor: Processor, turns: Sequence[Turn], *, images: int, system: str | None
) -> str:
    """Return the text of a conversation, with all images before the first question.

    The text ends with the last answer or, if that is None, with the generation prompt. `system` is
    the system message at the start. If the first question contains the processor's image token, it
    determines the places of its images, as in lmms-eval's adapter for LLaVA.

    Raises:
        UnfitImage: the number of image tokens differs from the number of images.
    """
    token = getattr(processor, "image_token", None)
    placed = turns[0][0].count(token) if token else 0
    if placed and placed != images:
        raise UnfitImage(
            f"the question contains {token} {placed} times, once for each image, but the number of "
            f"its images is {images}"
        )
    messages = _opening(system)
    for number, (question, answer) in enumerate(turns):
        placeholders = [{"type": "image"}] * (images - placed) if number == 0 else []
        content = [*placeholders, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return _rendered(processor, messages, add_generation_prompt=turns[-1][1] is None)


IMAGE_HERE = None
"""Placeholder for an image among the parts of a question."""


def render_interleaved(
    processor: Processor, parts: Sequence[str | None], *, system: str | None
) -> str:
    """Return the prompt of a question with images between its texts, given as `IMAGE_HERE`.

    Raises:
        UnfitImage: a text contains the image token.
    """
    token = getattr(processor, "image_token", None)
    texts = [part for part in parts if part is not None]
    if token and any(token in text for text in texts):
        raise UnfitImage(f"its text contains {token}, which is the placeholder of an image")
    content: list[dict[str, str]] = [
        {"type": "image"} if part is IMAGE_HERE else {"type": "text", "text": part}
        for part in parts
    ]
    messages: list[ChatMessage] = [*_opening(system), {"role": "user", "content": content}]
    return _rendered(processor, messages, add_generation_prompt=True)


def _opening(system: str | None) -> list[ChatMessage]:
    return [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []


def _rendered(
    processor: Processor, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
) -> str:
    try:
        return processor.apply_chat_template(
            messages,
            chat_template=chat_template(processor),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # A template is a program and may raise any exception.
        raise UserError(f"the model's chat template fails: {error_sentence(error)}") from error


def chat_template(processor: Processor) -> str | dict[str, str]:
    """Return the template of a processor's conversations, or its named templates."""
    return getattr(processor, "chat_template", None) or VICUNA_TEMPLATE


def encode_chats(
    processor: Processor,
    texts: Sequence[str],
    images: Sequence[Sequence[Image]],
    **options: object,
) -> dict[str, Tensor]:
    """Return the processor's tensors for rendered conversations and their images."""
    # Many chat templates write the BOS token themselves. The tokenizer would add a second one,
    # which changes the scores without an error.
    bos_token = processor.tokenizer.bos_token
    if bos_token and all(text.startswith(bos_token) for text in texts):
        options["add_special_tokens"] = False
    if any(images):  # A batch with only text has no argument `images`.
        options["images"] = [list(of_text) for of_text in images]
    return dict(processor(text=list(texts), return_tensors="pt", **options))
