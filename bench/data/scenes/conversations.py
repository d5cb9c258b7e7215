"""Scenes with questions of every kind and a full description: what the small model learns from."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.data.conversations import Conversation
from bench.data.scenes import prompts
from bench.data.scenes.kinds import KINDS, Question
from bench.data.scenes.render import render
from bench.data.scenes.scene import Scene, Split, scene

HINT = "The image shows a board of nine cells."
_FIRST = 10_000_000
_BEYOND = 10**12


@dataclass(frozen=True)
class Lesson:
    """What is asked about one image.

    `turns` questions of different kinds, `again` more questions of the kinds in `hard`, and
    `matching` questions whose answer stands in their own text, which teach what a letter is. Of
    questions that are not yes or no, the share `choices` is multiple choice; of those about numbers
    that are put openly, the share `ocr` comes with the numbers that are read in the image. The
    scenes have, in turn, at least so many digits as `digits` says.
    """

    turns: int = 6
    again: int = 0
    hard: tuple[str, ...] = ()
    matching: int = 0
    choices: float = 0.4
    ocr: float = 0.15
    digits: tuple[int, ...] = (0,)
    describe: bool = True


def conversations(
    split: Split, count: int, seed: int = 0, lesson: Lesson = Lesson()
) -> list[Conversation]:
    """Return conversations about `count` scenes, none of which is in any task."""
    return [conversation(split, seed, number, lesson) for number in range(count)]


def conversation(split: Split, seed: int, number: int, lesson: Lesson = Lesson()) -> Conversation:
    """Return one conversation, a pure function of its arguments.

    The description of every cell, where there is one, comes last.
    """
    place = _scene(split, _FIRST * (seed + 1) + number, lesson.digits[number % len(lesson.digits)])
    rng = random.Random(f"conversation {split} {place.index}")
    asked = _choose(place, sorted(KINDS), lesson.turns, rng)
    if lesson.again:
        asked += _choose(place, lesson.hard, lesson.again, rng)
    said = [_phrase(question, place, lesson, rng) for question in asked]
    said += [_match(rng) for _ in range(lesson.matching)]
    if lesson.describe:
        said.append((prompts.DESCRIBE, description(place)))
    return Conversation(render(place), said)


def description(place: Scene) -> str:
    """Name what is in every cell, in reading order."""
    return ", ".join(thing.name if thing else "empty" for thing in place.cells)


def _scene(split: Split, index: int, digits: int) -> Scene:
    """Return the first scene with so many digits, in steps that meet no other conversation's."""
    found = (scene(split, place) for place in itertools.count(index, _BEYOND))
    return next(place for place in found if len(place.digits) >= digits)


def _choose(place: Scene, kinds: Sequence[str], turns: int, rng: random.Random) -> list[Question]:
    """Draw kinds, then an answer among those the scene has, so that rare answers are asked for."""
    found: list[Question] = []
    for name in rng.sample(kinds, len(kinds)):
        by_answer = defaultdict(list)
        for question in KINDS[name].ask(place):
            by_answer[question.answer].append(question)
        if by_answer and len(found) < turns:
            found.append(rng.choice(by_answer[rng.choice(sorted(by_answer))]))
    return found


def _phrase(
    question: Question, place: Scene, lesson: Lesson, rng: random.Random
) -> tuple[str, str]:
    """Put a question openly or as multiple choice, in one of the harness's ways."""
    if "yes" not in question.answers and rng.random() < lesson.choices:
        return _lettered(question.text, question.answer, question.answers, rng)
    digits = [digit.value for digit in place.digits]
    shown = digits if question.kind.startswith("number") and rng.random() < lesson.ocr else []
    return prompts.brief(question.text, shown), question.answer


def _match(rng: random.Random) -> tuple[str, str]:
    """Ask for the letter of a word that the question itself names: no image is needed."""
    kind = KINDS[rng.choice([name for name, kind in KINDS.items() if "yes" not in kind.answers])]
    answer = rng.choice(kind.answers)
    return _lettered(f"Which one is {answer}?", answer, kind.answers, rng)


def _lettered(
    text: str, answer: str, answers: Sequence[str], rng: random.Random
) -> tuple[str, str]:
    """Put a question as multiple choice, in one of the harness's two ways."""
    choices = prompts.place(answer, answers, rng.randrange(4), rng)
    letter = prompts.LETTERS[choices.index(answer)]
    if rng.random() < 0.5 and len(choices) == 4:
        return prompts.options(text, choices, rng.choice(("nan", HINT))), letter
    return prompts.science(text, choices, rng.choice(("", HINT))), letter
