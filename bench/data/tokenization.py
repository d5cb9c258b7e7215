"""Text as token ids, without the special tokens that a tokenizer appends.

Special tokens before a text (BOS) are part of every protocol. Tokens appended to it (an EOS left
over from fine-tuning, SEP) end the text: an answer after a context that has ended would be scored
as a new text, and all answers to a question could have the likelihood of EOS after EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data.chat import Tokenizer

_PROBE = "a"


def appended_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer appends to every text, empty for most tokenizers."""
    ids = list(tokenizer(_PROBE)["input_ids"])
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    # The last occurrence, because tokens before the text may equal the probe's own ids.
    for start in range(len(ids) - len(plain), -1, -1):
        if ids[start : start + len(plain)] == plain:
            return ids[start + len(plain) :]
    return []


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool | None = None
) -> list[list[int]]:
    """Tokenize texts together; None adds special tokens in front if the tokenizer is set to."""
    options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    # `verbose=False` silences the warning that a text exceeds the model's context.
    ids: list[list[int]] = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    end = [] if add_special_tokens is False else appended_tokens(tokenizer)
    return [row[: -len(end)] if end and row[-len(end) :] == end else row for row in ids]


def without_appended(tokenizer: Tokenizer, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the columns [B, n] of n appended tokens from a processor's outputs."""
    end, ids_BT = appended_tokens(tokenizer), outputs["input_ids"]
    if not end or ids_BT[:, -len(end) :].tolist() != [end] * len(ids_BT):
        return outputs
    width = ids_BT.shape[1]
    return {
        # Only outputs with one column per token; pixels and grids have other widths or more axes.
        name: value[:, : width - len(end)] if tuple(value.shape[1:]) == (width,) else value
        for name, value in outputs.items()
    }
