"""Log-likelihood requests, their results, the scorer protocol, and truncation as in lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

Tokens: TypeAlias = list[int]


class Loglikelihood(NamedTuple):
    """The log-likelihood of a continuation, and whether it is the greedy one."""

    value: float
    greedy: bool


class LoglikelihoodRequest(NamedTuple):
    """One input of the network, and the tokens that its last positions should predict."""

    inputs: Tokens
    targets: Tokens


Loglikelihoods: TypeAlias = list[tuple[int, Loglikelihood]]
"""Log-likelihoods by index of request."""


class Scorer(Protocol):
    """Scores requests batch by batch, in an order of its choice."""

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the results of each batch when it is done; every index exactly once."""


def truncated_request(longest: int, context: Tokens, continuation: Tokens) -> LoglikelihoodRequest:
    """Return a request truncated on the left to at most `longest` input tokens.

    The continuation must have at least one token and fit into the model.
    """
    # As in lm-eval's `hf` model: keep the last max_length + 1 tokens, then drop the last one, which
    # is predicted and never an input. Truncation on the left keeps the whole continuation.
    tokens = (context + continuation)[-(longest + 1) :]
    return LoglikelihoodRequest(tokens[:-1], continuation)
