"""A scorer whose questions are spread over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.evaluation.ranks import Ranks
from bench.evaluation.text.question import Answers, Question, Scorer


class SpreadScorer:
    """Answers a share of the questions with its own scorer, and then has the others' answers.

    Questions are divided in sorted order, so that what they share stays together.
    """

    def __init__(self, scorer: Scorer, ranks: Ranks) -> None:
        self._scorer = scorer
        self._ranks = ranks

    def score(self, questions: Sequence[Question]) -> Iterator[Answers]:
        """Yield the answers of each batch, the other processes' last."""
        order = sorted(range(len(questions)), key=lambda number: questions[number].inputs)

        def own(mine: list[int]) -> Iterator[Answers]:
            for batch in self._scorer.score([questions[number] for number in mine]):
                yield [(mine[place], answer) for place, answer in batch]

        work = [len(questions[number].inputs) for number in order]
        yield from self._ranks.spread(order, work, own)
