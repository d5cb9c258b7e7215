"""Training text of the world: prose that states its facts, and rendered training questions."""

import random

from bench.data.world import prose
from bench.data.world.entities import build_world
from bench.data.world.render import render
from bench.data.world.sets import SEED, TASKS, documents

_TELLINGS = 30
"""Number of times that all facts are stated, each time in different words."""


def prose_texts(seed: int = SEED, tellings: int = _TELLINGS) -> list[str]:
    """Return prose that states all facts of the world `tellings` times."""
    # The prose states the facts of test entities as well: only questions about them are held out.
    world, rng = build_world(seed), random.Random(f"prose {seed}")
    return [text for _ in range(tellings) for text in prose.everything(rng, world)]


def question_texts(task: str, seed: int = SEED) -> list[str]:
    """Return a task's training questions with their answers, rendered as lm-eval does."""
    return [render(task, document).text for document in documents(task, "train", seed)]


def corpus(seed: int = SEED) -> list[str]:
    """Return all training documents: the prose, then the questions of each task."""
    return prose_texts(seed) + [text for task in TASKS for text in question_texts(task, seed)]
