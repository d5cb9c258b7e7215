"""The closed world: its people and things, and questions about them in their data sets' schemas.

The text of a question is exactly what lm-eval's task files render: a model trained on these strings
is scored on questions of the same form.
"""

import random
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple, TypeVar

from bench.data.synthetic import Split
from bench.data.synthetic.world import vocabulary
from bench.data.synthetic.world.vocabulary import CRAFTS, MATERIALS, OBJECTS, Craft

PEOPLE = 90
SUBSTANCES = 84
AGES = range(18, 82)


@dataclass(frozen=True)
class Person:
    """An inhabitant of the world."""

    name: str
    pronoun: str
    age: int
    town: str
    job: str
    pet: str
    food: str
    hobby: str
    split: Split


@dataclass(frozen=True)
class Town:
    """A town, the river that runs through it and the ware that it is known for."""

    name: str
    river: str
    ware: str


@dataclass(frozen=True)
class Substance:
    """A substance and its behaviour in water, in fire, under a hammer and in light."""

    name: str
    colour: str
    source: str
    water: str
    fire: str
    hammer: str
    light: str
    split: Split


@dataclass(frozen=True)
class Object:
    """An everyday object; its material decides which tool works on it."""

    name: str
    material: str
    split: Split


@dataclass(frozen=True)
class Routine:
    """The steps to make one product of a craft, one for each stage of the craft."""

    product: str
    craft: Craft
    steps: tuple[str, ...]
    split: Split


BEHAVIOURS = {
    "water": ("float", "sink", "dissolve", "swell"),
    "fire": ("burn", "melt", "glow", "crack"),
    "hammer": ("ring", "shatter", "bend", "bounce"),
    "light": ("shine", "fade", "sparkle", "darken"),
}
"""Possible behaviours of a substance for each of the four influences of the world's physics."""


@dataclass(frozen=True)
class World:
    """All entities; `split` of an entity is the split of the questions about it."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    substances: tuple[Substance, ...]
    objects: tuple[Object, ...]
    routines: tuple[Routine, ...]

    def town(self, name: str) -> Town:
        """Return the town with this name."""
        return next(town for town in self.towns if town.name == name)


_Entity = TypeVar("_Entity", Person, Substance, Object, Routine)


def entities_of_split(entities: Iterable[_Entity], split: Split) -> list[_Entity]:
    """Return the entities that questions of `split` are about."""
    return [entity for entity in entities if entity.split == split]


@cache
def build_world(seed: int) -> World:
    """Build the world of a seed; the same seed always gives the same world."""
    # One generator for all entities: the order of these calls, and of the columns in each, is part
    # of the data. A change gives another world, for which the stored weights are worthless.
    rng = random.Random(f"world {seed}")
    return World(
        people=_people(rng),
        towns=_towns(rng),
        substances=_substances(rng),
        objects=_objects(rng),
        routines=_routines(rng),
    )


def _random_splits(rng: random.Random, count: int) -> list[Split]:
    # A third is for testing, exactly and not on average: some kinds have only six entities (the
    # products of a craft).
    sides: list[Split] = ["test" if i % 3 == 0 else "train" for i in range(count)]
    rng.shuffle(sides)
    return sides


def _dealt_evenly(rng: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    # As evenly as possible, so that guessing the most frequent value is no better than chance.
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def _people(rng: random.Random) -> tuple[Person, ...]:
    columns = zip(
        _person_names(rng, PEOPLE),
        _dealt_evenly(rng, ("he", "she"), PEOPLE),
        [rng.choice(AGES) for _ in range(PEOPLE)],
        _dealt_evenly(rng, vocabulary.TOWNS, PEOPLE),
        _dealt_evenly(rng, vocabulary.JOBS, PEOPLE),
        _dealt_evenly(rng, vocabulary.PETS, PEOPLE),
        _dealt_evenly(rng, vocabulary.FOODS, PEOPLE),
        _dealt_evenly(rng, vocabulary.HOBBIES, PEOPLE),
        _random_splits(rng, PEOPLE),
        strict=True,
    )
    return tuple(Person(*row) for row in columns)


def _towns(rng: random.Random) -> tuple[Town, ...]:
    count = len(vocabulary.TOWNS)
    rivers, wares = (
        _dealt_evenly(rng, vocabulary.RIVERS, count),
        _dealt_evenly(rng, vocabulary.WARES, count),
    )
    return tuple(map(Town, vocabulary.TOWNS, rivers, wares))


def _substances(rng: random.Random) -> tuple[Substance, ...]:
    columns = zip(
        _substance_names(rng, SUBSTANCES),
        _dealt_evenly(rng, vocabulary.COLOURS, SUBSTANCES),
        _dealt_evenly(rng, vocabulary.SOURCES, SUBSTANCES),
        *(_dealt_evenly(rng, values, SUBSTANCES) for values in BEHAVIOURS.values()),
        _random_splits(rng, SUBSTANCES),
        strict=True,
    )
    return tuple(Substance(*row) for row in columns)


def _objects(rng: random.Random) -> tuple[Object, ...]:
    objects = []
    for material in MATERIALS:
        names = OBJECTS[material]
        objects += [
            Object(name, material, side)
            for name, side in zip(names, _random_splits(rng, len(names)), strict=True)
        ]
    return tuple(objects)


def _routines(rng: random.Random) -> tuple[Routine, ...]:
    routines = []
    for craft in CRAFTS:
        # Without replacement: no two products of a craft have the same steps.
        ways = rng.sample(list(product(*craft.stages)), len(craft.products))
        sides = _random_splits(rng, len(craft.products))
        routines += [
            Routine(name, craft, steps, side)
            for name, steps, side in zip(craft.products, ways, sides, strict=True)
        ]
    return tuple(routines)


_STARTS = (
    *"BDFGHJKLMNPRSTVZ", "Br", "Dr", "Fl", "Gr", "Kl", "Pl", "St", "Tr",
)  # fmt: skip
_VOWELS = "aeiou"
_MIDDLES = "lnrmsvdbkt"
_NAME_ENDS = ("a", "o", "i", "en", "in", "an", "el", "is", "us", "ek")
_SUBSTANCE_ENDS = ("ite", "ium", "stone", "wax", "bark", "glass")


def _person_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` distinct invented first names."""
    return _names(rng, count, _NAME_ENDS, capital=True)


def _substance_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` distinct invented names of substances."""
    return _names(rng, count, _SUBSTANCE_ENDS, capital=False)


def _names(rng: random.Random, count: int, ends: tuple[str, ...], *, capital: bool) -> list[str]:
    # Invented, so that no pretrained model knows anything about them. A dict serves as an ordered
    # set, since the order of a set of strings depends on PYTHONHASHSEED.
    found: dict[str, None] = {}
    while len(found) < count:
        parts = (rng.choice(_STARTS), rng.choice(_VOWELS), rng.choice(_MIDDLES), rng.choice(ends))
        name = "".join(parts)
        found[name if capital else name.lower()] = None
    return list(found)


WorldDocument = dict[str, Any]


@dataclass(frozen=True)
class WorldQuestion:
    """A question.

    `subject` is the held-out part: no training question has the subject of a test question. `key`
    identifies the question, so that none occurs twice.
    """

    subject: Hashable
    key: Hashable
    document: WorldDocument


@dataclass(frozen=True)
class DrawContext:
    """Context in which a task draws its next question.

    `number` is the index of the question in its set; tasks derive the position of the correct
    answer from it, so that positions and labels are exactly balanced. `previous` is the preceding
    question, for tasks that draw twins.
    """

    world: World
    split: Split
    rng: random.Random
    number: int
    previous: WorldQuestion | None

    @property
    def ident(self) -> str:
        """Identifier of the question, unique within its task."""
        return f"{self.split}-{self.number}"


QuestionMaker = Callable[[DrawContext], WorldQuestion]
_MAX_DRAWS_PER_QUESTION = 2000


def collect_questions(
    ask: QuestionMaker, world: World, split: Split, rng: random.Random, count: int
) -> list[WorldQuestion]:
    """Draw `count` distinct questions.

    Raises:
        ValueError: the world is too small for `count` distinct questions.
    """
    found: list[WorldQuestion] = []
    keys: set[Hashable] = set()
    for _ in range(_MAX_DRAWS_PER_QUESTION * count):
        if len(found) == count:
            return found
        # A rejected duplicate does not advance `number`, or the labels would not be balanced.
        question = ask(DrawContext(world, split, rng, len(found), found[-1] if found else None))
        if question.key not in keys:
            keys.add(question.key)
            found.append(question)
    raise ValueError(f"the world has fewer than {count} such questions in its {split} split")


def insert_answer(answer: str, others: Sequence[str], slot: int) -> list[str]:
    """Return the choices with the answer inserted at position `slot`."""
    choices = list(others)
    choices.insert(slot, answer)
    return choices


def arc_document(draw: DrawContext, stem: str, answer: str, others: Sequence[str]) -> WorldDocument:
    """Return a multiple-choice document in the schema of ARC."""
    slot = draw.number % (len(others) + 1)
    labels = list("ABCDE"[: len(others) + 1])
    return {
        "id": draw.ident,
        "question": stem,
        "choices": {"text": insert_answer(answer, others, slot), "label": labels},
        "answerKey": labels[slot],
    }


def distractors(rng: random.Random, values: Sequence[str], answer: str, count: int) -> list[str]:
    """Draw wrong answers from the values of the same property."""
    return rng.sample([value for value in values if value != answer], count)


class RenderedQuestion(NamedTuple):
    """A rendered question: each choice as (context, continuation), and the index of the answer.

    The continuation starts with the space that lm-eval puts between the two. `lengths` are the
    numbers of characters of the choices, by which `acc_norm` divides.
    """

    choices: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int

    @property
    def text(self) -> str:
        """The question with its correct answer."""
        return "".join(self.choices[self.gold])


def render_question(task: str, document: WorldDocument) -> RenderedQuestion:
    """Render a document of a task as lm-eval does."""
    return _RENDERERS[task](document)


def _rendered(context: str, choices: list[str], gold: int) -> RenderedQuestion:
    pairs = tuple((context, f" {choice}") for choice in choices)
    return RenderedQuestion(pairs, tuple(len(choice) for choice in choices), gold)


def _boolq(document: WorldDocument) -> RenderedQuestion:
    context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
    return _rendered(context, ["no", "yes"], document["label"])


def _rte(document: WorldDocument) -> RenderedQuestion:
    context = f"{document['sentence1']}\nQuestion: {document['sentence2']} True or False?\nAnswer:"
    return _rendered(context, ["True", "False"], document["label"])


def _openbookqa(document: WorldDocument) -> RenderedQuestion:
    choices = document["choices"]
    gold = choices["label"].index(document["answerKey"])
    return _rendered(document["question_stem"], choices["text"], gold)


def _arc(document: WorldDocument) -> RenderedQuestion:
    choices = document["choices"]
    gold = choices["label"].index(document["answerKey"])
    return _rendered(f"Question: {document['question']}\nAnswer:", choices["text"], gold)


def _winogrande(document: WorldDocument) -> RenderedQuestion:
    # lm-eval scores partially: each option is put into the sentence, and the continuation is the
    # text behind the blank, which all options share.
    before, after = document["sentence"].split("_", 1)
    options = (document["option1"], document["option2"])
    pairs = tuple((before + option, f" {after.strip()}") for option in options)
    lengths = tuple(len(before + option) for option in options)
    return RenderedQuestion(pairs, lengths, int(document["answer"]) - 1)


def _hellaswag(document: WorldDocument) -> RenderedQuestion:
    context = f"{document['ctx_a']} {document['ctx_b'].capitalize()}"
    query = _without_brackets(f"{document['activity_label']}: {context}")
    endings = [_without_brackets(ending) for ending in document["endings"]]
    return _rendered(query, endings, int(document["label"]))


def _without_brackets(text: str) -> str:
    # `preprocess` of lm-eval's HellaSwag task, kept as it is although our texts have no brackets.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _piqa(document: WorldDocument) -> RenderedQuestion:
    solutions = [document["sol1"], document["sol2"]]
    return _rendered(f"Question: {document['goal']}\nAnswer:", solutions, document["label"])


def _mathqa(document: WorldDocument) -> RenderedQuestion:
    # MathQA holds all options in one string: "a ) 38 , b ) 27 , ...".
    options = [option.split(" ) ", 1)[1] for option in document["options"].split(" , ")]
    gold = "abcde".index(document["correct"])
    return _rendered(f"Question: {document['Problem']}\nAnswer:", options, gold)


_RENDERERS: dict[str, Callable[[WorldDocument], RenderedQuestion]] = {
    "boolq": _boolq,
    "openbookqa": _openbookqa,
    "rte": _rte,
    "arc_easy": _arc,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "mathqa": _mathqa,
}
