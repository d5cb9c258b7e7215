"""Random rows of tokens cut from text, as the GPTQ and CAMERA code does it.

A whole text is joined by blank lines and tokenised once, and every row starts at a random token.
From separate documents, every row is a random window of a random document longer than the row.
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
    """Documents of one origin, and the number of rows to cut from them.

    `joined` documents form one long text; otherwise no row spans two documents.
    """

    origin: str
    documents: Sequence[str]
    rows: int
    joined: bool = True

    def cut(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        """Return the rows, each of `length` token ids.

        Raises:
            UserError: there are too few tokens; the message holds the counts.
        """
        if self.joined:
            return self._from_joined(length, tokenizer, rng)
        return self._from_documents(length, tokenizer, rng)

    def _from_joined(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        ids = _long_text("\n\n".join(self.documents), tokenizer)
        # Rows may overlap, but with fewer tokens than they hold most of them would. `randint` below
        # needs one token more than a row.
        needed = max(self.rows * length, length + 1)
        if len(ids) < needed:
            raise UserError(
                f"calibration text {self.origin} has {len(ids)} tokens, but {self.rows} rows of "
                f"{length} need {needed}: lower calibration.rows or calibration.length"
            )
        # GPTQ's bounds: `randint` includes both ends, and the last possible window is never drawn.
        starts = [rng.randint(0, len(ids) - length - 1) for _ in range(self.rows)]
        return [ids[start : start + length].tolist() for start in starts]

    def _from_documents(self, length: int, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        # The order of draws and their bounds are those of GPTQ's get_c4: draw a document until one
        # is long enough, then a start. Any other order (filtering short documents first, drawing
        # all starts at the end) would give different rows for a seed.
        rows: list[list[int]] = []
        too_short: set[int] = set()
        while len(rows) < self.rows:
            if len(too_short) == len(self.documents):
                raise UserError(
                    f"calibration text {self.origin}: none of its {len(self.documents)} documents "
                    f"is longer than {length} tokens: lower calibration.length"
                )
            chosen = rng.randint(0, len(self.documents) - 1)
            # Drawn all the same, as GPTQ does; only tokenising it a second time is saved.
            if chosen in too_short:
                continue
            ids = _tokens(self.documents[chosen], tokenizer)
            # Equal length is too short as well: `randint(0, -1)` would raise.
            if len(ids) <= length:
                too_short.add(chosen)
                continue
            start = rng.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        return rows


@functools.lru_cache(maxsize=2)
def _long_text(text: str, tokenizer: Any) -> array[int]:
    # Cached because every run of a sweep cuts the same text, and tokenising it is slow. Two
    # entries serve the two halves of `embedded`; an array takes 8 bytes per token, a list of
    # Python integers more than four times that.
    return array("q", _tokens(text, tokenizer))


def _tokens(text: str, tokenizer: Any) -> list[int]:
    # `verbose=False` silences the warning that the text exceeds the model's context.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
