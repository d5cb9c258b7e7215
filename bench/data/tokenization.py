"""Text as token ids, without the special tokens that a tokenizer appends.

What a tokenizer puts in front of a text (BOS) is part of every protocol. What it appends (EOS as
fine-tuning leaves it, SEP) ends the text, and nothing can follow it: an answer after a context that
has ended is scored as if it were a new text, and all answers to a question then have the likelihood
of EOS after EOS.

The ids of a long text are remembered in the user's cache folder: tokenizing millions of letters
takes seconds, and every run of a model calibrates on the same text.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.digests import cache_folder, read_checked, write_checked

if TYPE_CHECKING:
    from torch import Tensor

_PROBE = "a"
# Letters above which reading the ids back is faster than tokenizing once more.
_LONG_TEXT = 100_000


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


def token_ids(text: str, tokenizer: Any) -> array[int]:
    """Tokenize one text as the tokenizer is configured, or read its ids back.

    The returned array takes 4 bytes a token, a list of Python integers about nine times that.
    """
    if len(text) < _LONG_TEXT:
        return array("i", tokenizer(text, verbose=False)["input_ids"])
    return _long_token_ids(text, tokenizer)


# Two entries serve the two halves of `embedded` in all runs of a process.
@functools.lru_cache(maxsize=2)
def _long_token_ids(text: str, tokenizer: Any) -> array[int]:
    key = _memory_key(text, tokenizer)
    place = None if key is None else cache_folder("tokens") / key
    known = None if place is None else _read_ids(place)
    if known is not None:
        return known
    ids = array("i", tokenizer(text, verbose=False)["input_ids"])
    if place is not None:
        write_checked(place, ids.tobytes())
    return ids


def _memory_key(text: str, tokenizer: Any) -> str | None:
    """Hash all that decides the ids of a text; None for a tokenizer that runs Python of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    # The serialized form holds vocabulary, merges, normalisation and what is put around a text.
    # Its arguments count as well, but not where its files lie.
    settings = sorted(
        (name, repr(value))
        for name, value in tokenizer.init_kwargs.items()
        if name != "name_or_path" and not name.endswith("_file")
    )
    parts = (text, backend.to_str(), kind, repr(settings), *versions)
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        total.update(f"{len(content)}\n".encode() + content)
    return total.hexdigest()


def _read_ids(place: Path) -> array[int] | None:
    """Return remembered ids, or None if there are none or they are not what was written."""
    body, ids = read_checked(place), array("i")
    if body is None or len(body) % ids.itemsize:
        return None
    ids.frombytes(body)
    return ids
