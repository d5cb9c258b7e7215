"""Choose questions so that a question's text alone tells nothing about its answer.

Every wording of a kind is asked equally often with each answer that the kind has. What a model
without eyes can reach is then known exactly: one over the number of answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from bench.data.scenes.kinds import KINDS, Question, Subject
from bench.data.scenes.scene import Scene, Split, scene

PER_IMAGE = 4
_PATIENCE = 10_000


@dataclass(frozen=True)
class Placed:
    """A question and the scene that answers it."""

    scene: Scene
    question: Question


def balanced(kinds: Mapping[str, int], split: Split, start: int) -> list[Placed]:
    """Return each wording of each kind `kinds[name]` times with each answer.

    Scenes are searched from index `start` on, at most four questions are about one.
    """
    wanted = Counter(
        {
            (name, subject, answer): times
            for name, times in kinds.items()
            for subject in KINDS[name].subjects
            for answer in KINDS[name].answers
        }
    )
    found: list[Placed] = []
    for place in _scenes(split, start):
        found += [Placed(place, question) for question in _take(place, kinds, wanted)]
        if not wanted.total():
            return found
    raise AssertionError("unreachable")


def _take(
    place: Scene, kinds: Mapping[str, int], wanted: Counter[tuple[str, Subject, str]]
) -> Iterator[Question]:
    """Yield what of the wanted one scene can be asked, no two questions of it with one text."""
    questions = [question for name in kinds for question in KINDS[name].ask(place)]
    random.Random(f"questions {place.split} {place.index}").shuffle(questions)
    texts: set[str] = set()
    for question in questions:
        key = (question.kind, question.subject, question.answer)
        if wanted[key] and question.text not in texts and len(texts) < PER_IMAGE:
            wanted[key] -= 1
            texts.add(question.text)
            yield question


def paired(kind: str, times: int, split: Split, start: int) -> list[tuple[Placed, Placed]]:
    """Return pairs of questions about one scene, the first answered yes and the second no.

    Every wording is in equally many pairs as the one and as the other.
    """
    subjects = KINDS[kind].subjects
    plan = [
        (subject, subjects[(i + 1 + shift % (len(subjects) - 1)) % len(subjects)])
        for shift in range(times)
        for i, subject in enumerate(subjects)
    ]
    found: list[tuple[Placed, Placed]] = []
    for place in _scenes(split, start):
        questions = {question.subject: question for question in KINDS[kind].ask(place)}
        answers = {subject: question.answer for subject, question in questions.items()}
        for pair in plan:
            if [answers.get(subject) for subject in pair] == ["yes", "no"]:
                plan.remove(pair)
                first, second = (Placed(place, questions[subject]) for subject in pair)
                found.append((first, second))
                break
        if not plan:
            return found
    raise AssertionError("unreachable")


def _scenes(split: Split, start: int) -> Iterator[Scene]:
    """Yield scenes from an index on; a search that does not end is an error of the kinds."""
    for index in count(start):
        if index - start > _PATIENCE:
            raise ValueError(f"no scene among {_PATIENCE} answers the questions still wanted")
        yield scene(split, index)
