"""Text as token ids, without the special tokens that a tokenizer appends.

What a tokenizer puts in front of a text (BOS) is part of every protocol. What it appends (EOS as
fine-tuning leaves it, SEP) ends the text, and nothing can follow it: an answer after a context that
has ended is scored as if it were a new text, and all answers to a question then have the likelihood
of EOS after EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PROBE = "a"


def appended_tokens(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer appends to every text; empty for most of them."""
    ids = list(tokenizer(_PROBE)["input_ids"])
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    # The last occurrence: what stands in front may contain the probe's own ids.
    for start in range(len(ids) - len(plain), -1, -1):
        if ids[start : start + len(plain)] == plain:
            return ids[start + len(plain) :]
    return []


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool | None = None
) -> list[list[int]]:
    """Tokenize texts together; None adds special tokens in front as the tokenizer is configured."""
    options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    # `verbose=False` silences the warning that a text exceeds the model's context.
    ids: list[list[int]] = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    end = [] if add_special_tokens is False else appended_tokens(tokenizer)
    return [row[: -len(end)] if end and row[-len(end) :] == end else row for row in ids]


def without_appended(tokenizer: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from a processor's outputs the columns [B, n] of n appended tokens."""
    end, ids_BT = appended_tokens(tokenizer), outputs["input_ids"]
    if not end or ids_BT[:, -len(end) :].tolist() != [end] * len(ids_BT):
        return outputs
    width = ids_BT.shape[1]
    return {
        # All outputs with one column per token; pixels and grids have other widths or more axes.
        name: value[:, : width - len(end)] if tuple(value.shape[1:]) == (width,) else value
        for name, value in outputs.items()
    }
