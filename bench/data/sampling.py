"""Cutting rows of tokens out of text, as GPTQ's and CAMERA's code do.

A whole text is joined by blank lines and tokenised once, and every row starts at a random token;
from separate documents, every row is a random window of a random one that is longer than it.
"""

from __future__ import annotations

import functools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import UserError


@dataclass(frozen=True)
class Part:
    """Documents of one origin and how many rows are cut from them.

    `joined` documents are one long text; others stay apart, and a row never crosses two.
    """

    origin: str
    documents: Sequence[str]
    rows: int
    joined: bool = True

    def cut(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        """Return the rows, each of `length` token ids.

        Raises:
            UserError: there are fewer tokens than are asked for; the message has the counts.
        """
        if self.joined:
            return self._from_joined(length, tokenizer, rng)
        return self._from_documents(length, tokenizer, rng)

    def _from_joined(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        """Cut windows at random starts from all documents as one text."""
        ids = _long_text("\n\n".join(self.documents), tokenizer)
        needed = max(self.rows * length, length + 1)
        if len(ids) < needed:
            raise UserError(
                f"calibration text {self.origin} has {len(ids)} tokens, but {self.rows} rows of "
                f"{length} need {needed}: lower calibration.rows or calibration.length"
            )
        starts = [rng.randint(0, len(ids) - length - 1) for _ in range(self.rows)]
        return [ids[start : start + length].tolist() for start in starts]

    def _from_documents(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        """Cut one window each from random documents that are longer than it."""
        rows: list[list[int]] = []
        too_short: set[int] = set()
        while len(rows) < self.rows:
            if len(too_short) == len(self.documents):
                raise UserError(
                    f"calibration text {self.origin}: none of its {len(self.documents)} documents "
                    f"is longer than {length} tokens: lower calibration.length"
                )
            chosen = rng.randint(0, len(self.documents) - 1)
            if chosen in too_short:
                continue
            ids = _tokens(self.documents[chosen], tokenizer)
            if len(ids) <= length:
                too_short.add(chosen)
                continue
            start = rng.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        return rows


@functools.lru_cache(maxsize=2)
def _long_text(text: str, tokenizer: Any) -> array[int]:
    """Return a long text's token ids; every run of a sweep cuts the same text again."""
    return array("q", _tokens(text, tokenizer))


def _tokens(text: str, tokenizer: Any) -> list[int]:
    """Return a text's token ids; `verbose=False` since the text is longer than any model takes."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
