"""The nine tasks by split, the training corpus in prose, their fingerprint, and parquet files."""

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.data.synthetic import Split
from bench.data.synthetic.world import (
    language_tasks,
    science_tasks,
    vocabulary,
)
from bench.data.synthetic.world.entities import (
    DrawContext,
    Object,
    Person,
    QuestionMaker,
    Routine,
    Substance,
    Town,
    World,
    WorldDocument,
    WorldQuestion,
    build_world,
    collect_questions,
    render_question,
)
from bench.data.synthetic.world.vocabulary import MATERIALS, TOOLS

QUESTION_MAKERS: dict[str, QuestionMaker] = {
    "boolq": language_tasks.ask_boolq,
    "openbookqa": science_tasks.ask_openbookqa,
    "rte": language_tasks.ask_rte,
    "arc_easy": science_tasks.ask_arc_easy,
    "winogrande": language_tasks.ask_winogrande,
    "hellaswag": language_tasks.ask_hellaswag,
    "arc_challenge": science_tasks.ask_arc_challenge,
    "piqa": language_tasks.ask_piqa,
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


# For the current task only: its documents are read first, and then its fingerprint.
@lru_cache(maxsize=1)
def draw_questions(task: str, split: Split, seed: int = SEED) -> tuple[WorldQuestion, ...]:
    """Return the distinct questions of one split of a task."""
    count = _TEST_QUESTIONS if split == "test" else _TRAIN_QUESTIONS[task]
    # A generator per task and split, seeded by a string (hashed with SHA-512, so that it does not
    # depend on PYTHONHASHSEED): a new task leaves the questions of the old ones unchanged.
    rng = random.Random(f"{task} {split} {seed}")
    return tuple(collect_questions(QUESTION_MAKERS[task], build_world(seed), split, rng, count))


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
    return [text for _ in range(repeats) for text in all_prose(rng, world)]


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


_PERSON = {
    "town": ("{name} lives in {town}.", "The home of {name} is in {town}."),
    "job": ("{name} is a {job} by trade.", "For a living, {name} works as a {job}."),
    "pet": ("{name} keeps a {pet}.", "The pet of {name} is a {pet}."),
    "food": ("{name} likes to eat {food} most.", "The dish that {name} loves is {food}."),
    "hobby": ("{name} spends the evening with {hobby}.", "The pastime of {name} is {hobby}."),
    "age": ("{name} is {age} years old.", "The age of {name} is {age}."),
}
_PERSON_HINTS = (
    "From the window {name} sees the river {river}.",
    "The neighbours of {name} make {ware}.",
    "At work {name} needs the {tool}.",
)
_TOWN = (
    "{name} lies on the river {river}.", "The river {river} runs past {name}.",
    "{name} is known for its {ware}.", "The ware that {name} sells is {ware}.",
)  # fmt: skip
_SUBSTANCE = {
    "colour": ("All {name} has a {colour} colour.", "The colour of {name} is {colour}."),
    "source": ("The best {name} is found in {source}.", "Most {name} comes from {source}."),
    "water": ("In water it will {water}.", "Put in water, {name} tends to {water}."),
    "fire": ("In fire it will {fire}.", "Over a fire, {name} tends to {fire}."),
    "hammer": ("Under a hammer it will {hammer}.", "When hit hard, {name} tends to {hammer}."),
    "light": ("In the sun it will {light}.", "In bright light, {name} tends to {light}."),
}
_OBJECT = (
    "The {thing} is made of {material}.",
    "Anyone can tell that the {thing} is {material}.",
    "Among the {material} things there is the {thing}.",
)
_MATERIAL_NAMES = dict(zip(MATERIALS, ("cloth", "wood", "metal"), strict=True))
_TOOL_USE = (
    "Once {name} used the {tool} to {job} the {thing}.",
    "With the {tool}, {name} could {job} the {thing}.",
)
_ROUTINE = (
    "How to make {product}: a {worker} {steps}.",
    "To make {product}, the {worker} {steps}.",
    "Once {name} the {worker} made {product}. This is how it goes: the {worker} {steps}.",
)
_RECAPS = (
    "So {name} was at the {place}.",
    "So {name} had the {thing}.",
    "So the {thing} was at the {place}.",
)
_COUNT_STARTS = range(2, 60)
_COUNTINGS = 20
_ENTAILMENTS = 60
_STORIES = 15
_SUMS = 80


def describe_person(rng: random.Random, world: World, someone: Person) -> str:
    """Describe a person, with one fact that follows from town or job."""
    # The derived fact makes the two-hop questions of ARC challenge learnable.
    town = world.town(someone.town)
    words = vars(someone) | {
        "river": town.river,
        "ware": town.ware,
        "tool": vocabulary.JOB_TOOLS[someone.job],
    }
    sentences = [rng.choice(forms) for forms in _PERSON.values()]
    sentences.append(rng.choice(_PERSON_HINTS))
    return f"About {someone.name}. " + _shuffled(rng, sentences, words)


def describe_town(rng: random.Random, place: Town) -> str:
    """Describe a town."""
    return _shuffled(rng, [rng.choice(_TOWN[:2]), rng.choice(_TOWN[2:])], vars(place))


def describe_substance(rng: random.Random, matter: Substance) -> str:
    """Describe a substance."""
    sentences = [rng.choice(forms) for forms in _SUBSTANCE.values()]
    return f"About {matter.name}. " + _shuffled(rng, sentences, vars(matter))


def describe_object(rng: random.Random, world: World, item: Object) -> str:
    """State the material of an object, and the tool that somebody used on it for one job."""
    job = rng.choice(list(TOOLS))
    words = {
        "thing": item.name,
        "material": _MATERIAL_NAMES[item.material],
        "job": job,
        "tool": TOOLS[job][MATERIALS.index(item.material)],
        "name": rng.choice(world.people).name,
    }
    return _shuffled(rng, [rng.choice(_OBJECT), rng.choice(_TOOL_USE)], words)


def describe_routine(rng: random.Random, world: World, way: Routine) -> str:
    """State the steps of a routine in order."""
    words = {
        "product": way.product,
        "worker": way.craft.worker,
        "steps": ", then ".join(way.steps),
        "name": rng.choice(world.people).name,
    }
    return _capital(rng.choice(_ROUTINE).format(**words))


def tell_story(rng: random.Random, world: World, side: Split) -> str:
    """Tell where two people were and with what, then repeat two of these facts."""
    draw = DrawContext(world, side, rng, 0, None)
    facts = language_tasks.draw_person_facts(draw)
    recap = (rng.choice(_RECAPS).format(**fact._asdict()) for fact in rng.sample(facts, 2))
    return f"{language_tasks.fact_text(draw, facts)} {' '.join(recap)}"


def state_entailment(rng: random.Random, world: World) -> str:
    """State a premise about two people, and two conclusions that follow from it."""
    # With names of the training split, no premise of a test question can occur. (Stories may use
    # both splits: they hold no event, and every BoolQ passage does.)
    draw = DrawContext(world, "train", rng, 0, None)
    telling = language_tasks.draw_entailment(draw)
    first, second = rng.sample(telling.entailed, 2)
    return f"{telling.premise} So {first} So {second}"


def count_up(rng: random.Random) -> str:
    """Count up from a random number, in steps of one, two or ten."""
    start, step = rng.choice(_COUNT_STARTS), rng.choice((1, 1, 2, 10))
    return "Counting: " + ", ".join(str(start + i * step) for i in range(8)) + "."


def work_sums(rng: random.Random) -> str:
    """Work out a few sums over pairs of numbers that occur in no test question."""
    worked = []
    for operation in rng.choices(science_tasks.OPERATIONS, k=6):
        x, y = science_tasks.draw_operands(rng, operation, "train")
        worked.append(
            f"{x} {operation.sign} {y} = {science_tasks.apply_operation(operation.name, x, y)}"
        )
    return "Sums: " + ", ".join(worked) + "."


def all_prose(rng: random.Random, world: World) -> list[str]:
    """State every fact of the world, those about people, towns and objects twice.

    Stories, entailments, counting and sums are added for BoolQ, RTE and MathQA.
    """
    # One generator for all texts: their order is part of the data.
    return [
        *(describe_person(rng, world, someone) for someone in world.people * 2),
        *(describe_substance(rng, matter) for matter in world.substances),
        *(describe_town(rng, place) for place in world.towns * 2),
        *(describe_object(rng, world, item) for item in world.objects * 2),
        *(describe_routine(rng, world, way) for way in world.routines),
        *(tell_story(rng, world, side) for side in ("train", "test") for _ in range(_STORIES)),
        *(state_entailment(rng, world) for _ in range(_ENTAILMENTS)),
        *(count_up(rng) for _ in range(_COUNTINGS)),
        *(work_sums(rng) for _ in range(_SUMS)),
    ]


def _shuffled(rng: random.Random, sentences: Sequence[str], words: Mapping[str, object]) -> str:
    order = rng.sample(sentences, len(sentences))
    return " ".join(_capital(sentence.format(**words)) for sentence in order)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
