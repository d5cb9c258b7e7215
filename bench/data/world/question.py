"""A question in the schema of its data set, with its held-out subject and its key."""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.data.world.entities import Split, World

Document = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question.

    `subject` is the held-out part: no training question has the subject of a test question. `key`
    identifies the question, so that none occurs twice.
    """

    subject: Hashable
    key: Hashable
    document: Document


@dataclass(frozen=True)
class Draw:
    """Context in which a task draws its next question.

    `number` is the index of the question in its set; tasks derive the position of the correct
    answer from it, so that positions and labels are exactly balanced. `previous` is the preceding
    question, for tasks that draw twins.
    """

    world: World
    split: Split
    rng: random.Random
    number: int
    previous: Question | None

    @property
    def ident(self) -> str:
        """Identifier of the question, unique within its task."""
        return f"{self.split}-{self.number}"


Ask = Callable[[Draw], Question]

_PATIENCE = 2000


def collect(ask: Ask, world: World, split: Split, rng: random.Random, count: int) -> list[Question]:
    """Draw `count` distinct questions.

    Raises:
        ValueError: the world is too small for `count` distinct questions.
    """
    found: list[Question] = []
    keys: set[Hashable] = set()
    for _ in range(_PATIENCE * count):
        if len(found) == count:
            return found
        # A rejected duplicate does not advance `number`, or the labels would not be balanced.
        question = ask(Draw(world, split, rng, len(found), found[-1] if found else None))
        if question.key not in keys:
            keys.add(question.key)
            found.append(question)
    raise ValueError(f"the world has fewer than {count} such questions in its {split} split")


def place(answer: str, others: Sequence[str], slot: int) -> list[str]:
    """Return the choices with the answer inserted at position `slot`."""
    choices = list(others)
    choices.insert(slot, answer)
    return choices


def exam(draw: Draw, stem: str, answer: str, others: Sequence[str]) -> Document:
    """Return a multiple-choice document in the schema of ARC."""
    slot = draw.number % (len(others) + 1)
    labels = list("ABCDE"[: len(others) + 1])
    return {
        "id": draw.ident,
        "question": stem,
        "choices": {"text": place(answer, others, slot), "label": labels},
        "answerKey": labels[slot],
    }


def distractors(rng: random.Random, values: Sequence[str], answer: str, count: int) -> list[str]:
    """Draw wrong answers from the values of the same property."""
    return rng.sample([value for value in values if value != answer], count)
