"""Scorer that partitions its requests among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.evaluation.ranks import Ranks
from bench.evaluation.text.question import Answers, Question, Scorer


class SpreadScorer:
    """Scores a share of the requests with its own scorer, then receives the others' responses."""

    def __init__(self, scorer: Scorer, ranks: Ranks) -> None:
        self._scorer = scorer
        self._ranks = ranks

    def score(self, questions: Sequence[Question]) -> Iterator[Answers]:
        """Yield the responses of each batch, those of other processes last."""
        # Sorted by tokens, so that a contiguous share keeps requests with a common prefix together:
        # a prefix cut by a border is computed twice, all others once.
        order = sorted(range(len(questions)), key=lambda number: questions[number].inputs)

        def own(mine: list[int]) -> Iterator[Answers]:
            for batch in self._scorer.score([questions[number] for number in mine]):
                yield [(mine[place], answer) for place, answer in batch]

        work = [len(questions[number].inputs) for number in order]
        yield from self._ranks.spread(order, work, own)
