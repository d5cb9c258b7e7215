"""Scenes with questions of every kind and a full description: what the small model learns from."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import NamedTuple

from PIL import Image

from bench.data.scenes import prompts
from bench.data.scenes.kinds import KINDS, Question
from bench.data.scenes.render import render
from bench.data.scenes.scene import Scene, Split, scene

TURNS = 6
CHOICE_SHARE = 0.4
OCR_SHARE = 0.15
HINT = "The image shows a board of nine cells."
_FIRST = 10_000_000


class Conversation(NamedTuple):
    """An image and what is said about it: prompts as lmms-eval gives them, and their answers."""

    image: Image.Image
    turns: list[tuple[str, str]]


def conversations(
    split: Split, count: int, seed: int = 0, *, turns: int = TURNS, describe: bool = True
) -> list[Conversation]:
    """Return conversations about `count` scenes, none of which is in any task.

    Each has `turns` questions of different kinds and, unless `describe` is false, ends with the
    description of every cell.
    """
    return [conversation(split, seed, number, turns, describe) for number in range(count)]


def conversation(
    split: Split, seed: int, number: int, turns: int = TURNS, describe: bool = True
) -> Conversation:
    """Return one conversation, a pure function of its arguments."""
    place = scene(split, _FIRST * (seed + 1) + number)
    rng = random.Random(f"conversation {split} {place.index}")
    said = [_phrase(question, place, rng) for question in _choose(place, turns, rng)]
    if describe:
        said.append((prompts.DESCRIBE, description(place)))
    return Conversation(render(place), said)


def description(place: Scene) -> str:
    """Name what is in every cell, in reading order."""
    return ", ".join(thing.name if thing else "empty" for thing in place.cells)


def _choose(place: Scene, turns: int, rng: random.Random) -> list[Question]:
    """Draw kinds, then an answer among those the scene has, so that rare answers are asked for."""
    found: list[Question] = []
    for name in rng.sample(sorted(KINDS), len(KINDS)):
        by_answer = defaultdict(list)
        for question in KINDS[name].ask(place):
            by_answer[question.answer].append(question)
        if by_answer and len(found) < turns:
            found.append(rng.choice(by_answer[rng.choice(sorted(by_answer))]))
    return found


def _phrase(question: Question, place: Scene, rng: random.Random) -> tuple[str, str]:
    """Put a question openly or as multiple choice, in one of the harness's ways."""
    if "yes" not in question.answers and rng.random() < CHOICE_SHARE:
        choices = prompts.place(question.answer, question.answers, rng.randrange(4), rng)
        letter = prompts.LETTERS[choices.index(question.answer)]
        if rng.random() < 0.5 and len(choices) == 4:
            return prompts.options(question.text, choices, rng.choice(("nan", HINT))), letter
        return prompts.science(question.text, choices, rng.choice(("", HINT))), letter
    digits = [digit.value for digit in place.digits]
    shown = digits if question.kind.startswith("number") and rng.random() < OCR_SHARE else []
    return prompts.brief(question.text, shown), question.answer
