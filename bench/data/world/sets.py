"""Question sets of the world, by task and by the split names of the real data sets."""

import hashlib
import json
import random

from bench.data.world.entities import Split, build_world
from bench.data.world.question import Document, Question, collect
from bench.data.world.tasks import ASK

SEED = 2024
TASKS = tuple(ASK)

_TEST_QUESTIONS = 400
_TRAIN_QUESTIONS = {
    "boolq": 8000,
    "openbookqa": 800,
    "rte": 8000,
    "arc_easy": 1000,
    "winogrande": 3000,
    "hellaswag": 1500,
    "arc_challenge": 1500,
    "piqa": 1000,
    "mathqa": 4000,
}
_VALIDATION_SHARE = 20
_WITHOUT_TEST_LABELS = frozenset({"boolq", "rte", "winogrande", "hellaswag", "piqa"})


def questions(task: str, split: Split, seed: int = SEED) -> list[Question]:
    """Return the distinct questions of one split of a task."""
    count = _TEST_QUESTIONS if split == "test" else _TRAIN_QUESTIONS[task]
    # A generator per task and split, seeded by a string (hashed with SHA-512, so that it does not
    # depend on PYTHONHASHSEED): a new task leaves the questions of the old ones unchanged.
    rng = random.Random(f"{task} {split} {seed}")
    return collect(ASK[task], build_world(seed), split, rng, count)


def documents(task: str, split: Split, seed: int = SEED) -> list[Document]:
    """Return the documents of one split of a task in the schema of its data set."""
    return [question.document for question in questions(task, split, seed)]


def splits(task: str, seed: int = SEED) -> dict[str, list[Document]]:
    """Return a task's documents by the split names that lm-eval's task file uses.

    Where the real data set hides its test labels, lm-eval scores `validation`; elsewhere it scores
    `test`, and `validation` is a slice of the training questions.
    """
    train, test = documents(task, "train", seed), documents(task, "test", seed)
    if task in _WITHOUT_TEST_LABELS:
        return {"train": train, "validation": test}
    held = len(train) // _VALIDATION_SHARE
    return {"train": train[held:], "validation": train[:held], "test": test}


def fingerprint(task: str | None = None, seed: int = SEED) -> str:
    """Return the SHA-256 of the test documents of one task, or of all tasks."""
    tests = {name: documents(name, "test", seed) for name in ([task] if task else TASKS)}
    return hashlib.sha256(json.dumps(tests, sort_keys=True).encode()).hexdigest()
