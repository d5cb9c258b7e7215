"""What slimbench uses of the tokenizers and processors of transformers, which have no types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Tokenizer(Protocol):
    """Text as token ids."""

    padding_side: str
    bos_token: str | None
    pad_token_id: int

    def __hash__(self) -> int: ...

    def __call__(
        self, text: str, *, verbose: bool = True, add_special_tokens: bool = True
    ) -> Mapping[str, list[int]]:
        """Return the ids of a text as `input_ids`; `verbose` warns if it is long."""


class Processor(Protocol):
    """Images and text as inputs of a vision-language model."""

    tokenizer: Tokenizer

    def __call__(self, *, text: list[str], return_tensors: str, **options: object) -> ModelInputs:
        """Return tensors by the names under which the model takes them."""

    def apply_chat_template(self, conversation: Sequence[ChatMessage], **options: object) -> str:
        """Return the text of a conversation."""


ModelInputs = Mapping[str, "Tensor"]

# `role`, and `content`: parts with a `type` and, for text, the `text`.
ChatMessage = dict[str, str | list[dict[str, str]]]
