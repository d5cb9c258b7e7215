"""What a scorer is asked and what it answers; the harness's rule for prompts that are too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from bench.errors import UserError
from bench.models.model import Model

Tokens: TypeAlias = list[int]


class Scored(NamedTuple):
    """The log-likelihood of a continuation, and whether it is the greedy one."""

    value: float
    greedy: bool


class Question(NamedTuple):
    """One input of the network, and the tokens that its last positions should predict."""

    inputs: Tokens
    targets: Tokens


Answers: TypeAlias = list[tuple[int, Scored]]
"""Answers to some questions, by their numbers."""


class Scorer(Protocol):
    """Answers questions batch by batch, in an order of its own."""

    def score(self, questions: Sequence[Question]) -> Iterator[Answers]:
        """Yield the answers of each batch as soon as there are any; every number once."""


def question(model: Model, context: Tokens, continuation: Tokens) -> Question:
    """Return a request as the network sees it: its end, if it is longer than the model allows.

    The last token of a continuation is never an input.
    """
    longest = model.max_length
    if not 0 < len(continuation) <= longest:
        raise UserError(
            f"an answer of {len(continuation)} tokens cannot be scored: "
            f"model {model.name} takes 1 to {longest}"
        )
    return Question((context + continuation)[-(longest + 1) : -1], continuation)
