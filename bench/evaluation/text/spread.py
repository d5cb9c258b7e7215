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
        mine = self._ranks.share([len(questions[number].inputs) for number in order])
        numbers = [order[place] for place in mine]
        own: Answers = []
        for batch in self._scorer.score([questions[number] for number in numbers]):
            answers = [(numbers[place], answer) for place, answer in batch]
            own += answers
            yield answers
        known = set(numbers)
        others = [each for each in self._ranks.together(own) if each[0] not in known]
        if others:
            yield others
