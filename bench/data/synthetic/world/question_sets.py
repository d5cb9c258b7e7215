"""The nine tasks by split, the training corpus, their fingerprint, and parquet files of them."""

import argparse
import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.data.synthetic import Split
from bench.data.synthetic.world import (
    commonsense_tasks,
    prose,
    reading_tasks,
    science_tasks,
)
from bench.data.synthetic.world.entities import build_world
from bench.data.synthetic.world.questions import (
    QuestionMaker,
    WorldDocument,
    WorldQuestion,
    collect_questions,
    render_question,
)

QUESTION_MAKERS: dict[str, QuestionMaker] = {
    "boolq": reading_tasks.ask_boolq,
    "openbookqa": science_tasks.ask_openbookqa,
    "rte": reading_tasks.ask_rte,
    "arc_easy": science_tasks.ask_arc_easy,
    "winogrande": commonsense_tasks.ask_winogrande,
    "hellaswag": commonsense_tasks.ask_hellaswag,
    "arc_challenge": science_tasks.ask_arc_challenge,
    "piqa": commonsense_tasks.ask_piqa,
    "mathqa": science_tasks.ask_mathqa,
}
"""The function that draws a question, by lm-eval's name of the task."""
SEED = 2024
TASKS = tuple(QUESTION_MAKERS)
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
_VALIDATION_DIVISOR = 20
_WITHOUT_TEST_LABELS = frozenset({"boolq", "rte", "winogrande", "hellaswag", "piqa"})


def draw_questions(task: str, split: Split, seed: int = SEED) -> list[WorldQuestion]:
    """Return the distinct questions of one split of a task."""
    count = _TEST_QUESTIONS if split == "test" else _TRAIN_QUESTIONS[task]
    # A generator per task and split, seeded by a string (hashed with SHA-512, so that it does not
    # depend on PYTHONHASHSEED): a new task leaves the questions of the old ones unchanged.
    rng = random.Random(f"{task} {split} {seed}")
    return collect_questions(QUESTION_MAKERS[task], build_world(seed), split, rng, count)


def documents(task: str, split: Split, seed: int = SEED) -> list[WorldDocument]:
    """Return the documents of one split of a task in the schema of its data set."""
    return [question.document for question in draw_questions(task, split, seed)]


def documents_by_split(task: str, seed: int = SEED) -> dict[str, list[WorldDocument]]:
    """Return a task's documents by the split names that lm-eval's task file uses.

    Where the real data set hides its test labels, lm-eval scores `validation`; elsewhere it scores
    `test`, and `validation` is a slice of the training questions.
    """
    train, test = documents(task, "train", seed), documents(task, "test", seed)
    if task in _WITHOUT_TEST_LABELS:
        return {"train": train, "validation": test}
    held = len(train) // _VALIDATION_DIVISOR
    return {"train": train[held:], "validation": train[:held], "test": test}


def fingerprint(task: str | None = None, seed: int = SEED) -> str:
    """Return the SHA-256 of the test documents of one task, or of all tasks."""
    tests = {name: documents(name, "test", seed) for name in ([task] if task else TASKS)}
    return hashlib.sha256(json.dumps(tests, sort_keys=True).encode()).hexdigest()


_PROSE_REPEATS = 30
"""Number of times that all facts are stated, each time in different words."""


def prose_texts(seed: int = SEED, repeats: int = _PROSE_REPEATS) -> list[str]:
    """Return prose that states all facts of the world `repeats` times."""
    # The prose states the facts of test entities as well: only questions about them are held out.
    world, rng = build_world(seed), random.Random(f"prose {seed}")
    return [text for _ in range(repeats) for text in prose.all_prose(rng, world)]


def question_texts(task: str, seed: int = SEED) -> list[str]:
    """Return a task's training questions with their answers, rendered as lm-eval does."""
    return [render_question(task, document).text for document in documents(task, "train", seed)]


def corpus(seed: int = SEED) -> list[str]:
    """Return all training documents: the prose, then the questions of each task."""
    return prose_texts(seed) + [text for task in TASKS for text in question_texts(task, seed)]


def write_parquet(folder: Path, seed: int) -> None:
    """Write `folder/<task>/<split>.parquet` for every task and split."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, documents in documents_by_split(task, seed).items():
            pq.write_table(pa.Table.from_pylist(documents), folder / task / f"{split}.parquet")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_parquet(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
