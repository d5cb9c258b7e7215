"""Windows of tokens cut from texts, as in GPTQ's evaluation scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from bench.errors import UserError

Encode = Callable[[str], list[int]]
C4_WINDOWS = 256


def consecutive(documents: Sequence[str], encode: Encode, window: int) -> list[list[int]]:
    """Join documents by blank lines, tokenize once and cut; the remainder is dropped."""
    # Tokenized as one string, not per document: BOS appears once, and tokens may span a border.
    # Published perplexities of WikiText-2 depend on both.
    tokens = encode("\n\n".join(documents))
    count = len(tokens) // window
    if count == 0:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {window}")
    return [tokens[i * window : (i + 1) * window] for i in range(count)]


def drawn(
    documents: Sequence[str], encode: Encode, window: int, count: int = C4_WINDOWS
) -> list[list[int]]:
    """Draw windows at random from documents longer than a window, with seed 0."""
    # The order of draws is that of `get_c4` in GPTQ's datautils.py (a document until one is long
    # enough, then an offset), from the same generator: any other order gives other windows and
    # other perplexities. The offset's bound, too, is the script's, although it never draws the last
    # window.
    draw = random.Random(0)
    too_short: set[int] = set()
    windows: list[list[int]] = []
    while len(windows) < count:
        number = draw.randint(0, len(documents) - 1)
        # A short document is not tokenized again, but still takes its draw, or the sequence would
        # change.
        tokens = [] if number in too_short else encode(documents[number])
        if len(tokens) <= window:
            too_short.add(number)
            if len(too_short) == len(documents):
                raise UserError(f"no document of the text is longer than a window of {window}")
            continue
        start = draw.randint(0, len(tokens) - window - 1)
        windows.append(tokens[start : start + window])
    return windows
