"""A question in the schema of its data set, with the structured key of what it asks."""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.data.world.entities import Split, World

Document = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question.

    ``subject`` is the part of it that is held out: no training question has the subject of a
    test question. ``key`` is all that it asks, so that no question is asked twice.
    """

    subject: Hashable
    key: Hashable
    document: Document


@dataclass(frozen=True)
class Draw:
    """What a task needs to draw its next question: the world, the side, and where it stands.

    ``number`` counts the questions of the set; the tasks let it choose the position of the
    right answer, so positions and labels are exactly balanced. ``previous`` is the question
    before it, for tasks that ask twins.
    """

    world: World
    split: Split
    rng: random.Random
    number: int
    previous: Question | None

    @property
    def ident(self) -> str:
        """An identifier of the question that is unique within its task."""
        return f"{self.split}-{self.number}"


Ask = Callable[[Draw], Question]

_PATIENCE = 2000


def collect(ask: Ask, world: World, split: Split, rng: random.Random, count: int) -> list[Question]:
    """Draw ``count`` different questions."""
    found: list[Question] = []
    keys: set[Hashable] = set()
    for _ in range(_PATIENCE * count):
        if len(found) == count:
            return found
        question = ask(Draw(world, split, rng, len(found), found[-1] if found else None))
        if question.key not in keys:
            keys.add(question.key)
            found.append(question)
    raise ValueError(f"the world has fewer than {count} such questions on its {split} side")


def place(answer: str, others: Sequence[str], slot: int) -> list[str]:
    """Return the choices in order, with the answer at position ``slot``."""
    choices = list(others)
    choices.insert(slot, answer)
    return choices


def exam(draw: Draw, stem: str, answer: str, others: Sequence[str]) -> Document:
    """Return a four-choice document in the schema of ARC."""
    slot = draw.number % (len(others) + 1)
    labels = list("ABCDE"[: len(others) + 1])
    return {
        "id": draw.ident,
        "question": stem,
        "choices": {"text": place(answer, others, slot), "label": labels},
        "answerKey": labels[slot],
    }


def distractors(rng: random.Random, values: Sequence[str], answer: str, count: int) -> list[str]:
    """Draw wrong answers from the values of the same kind."""
    return rng.sample([value for value in values if value != answer], count)
