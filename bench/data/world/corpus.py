"""The training text of the world: prose that states its facts, and rendered train questions."""

import random

from bench.data.world import prose
from bench.data.world.entities import build_world
from bench.data.world.render import render
from bench.data.world.sets import SEED, TASKS, documents

_TELLINGS = 30
"""How often all facts are told, each time in other words."""


def prose_texts(seed: int = SEED, tellings: int = _TELLINGS) -> list[str]:
    """Return prose that tells all facts of the world ``tellings`` times."""
    world, rng = build_world(seed), random.Random(f"prose {seed}")
    return [text for _ in range(tellings) for text in prose.everything(rng, world)]


def question_texts(task: str, seed: int = SEED) -> list[str]:
    """Return a task's training questions with their answers, as lm-eval would render them."""
    return [render(task, document).text for document in documents(task, "train", seed)]


def corpus(seed: int = SEED) -> list[str]:
    """Return all training documents: the prose, then the questions of each task."""
    return prose_texts(seed) + [text for task in TASKS for text in question_texts(task, seed)]
