"""ARC, OpenBookQA and MathQA of the closed world.

MathQA asks small word problems over pairs of numbers that the training text never has.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from bench.data.synthetic import Split
from bench.data.synthetic.world import vocabulary
from bench.data.synthetic.world.entities import (
    BEHAVIOURS,
    DrawContext,
    Person,
    Substance,
    WorldQuestion,
    arc_document,
    distractors,
    entities_of_split,
    insert_answer,
)
from bench.data.synthetic.world.vocabulary import GOODS

_TEST_BUCKETS = 4
_OPTION_OFFSETS = (-21, -16, -12, -9, -6, -4, 4, 6, 9, 12, 16, 21)


class Operation(NamedTuple):
    """An arithmetic operation, the ranges of its operands, and its wordings."""

    name: str
    sign: str
    category: str
    numbers: tuple[range, range]
    forms: tuple[str, ...]


OPERATIONS = (
    Operation(
        "add", "+", "gain", (range(2, 26), range(2, 26)),
        ("now {name} has {x} {goods} and gets {y} more . how many {goods} does {name} have now ?",
         "there are {x} {goods} in one box and {y} in another . how many {goods} in all ?",
         "today {name} found {x} {goods} and bought {y} {goods} . what is the total ?"),
    ),
    Operation(
        "subtract", "-", "loss", (range(2, 26), range(2, 26)),
        ("once {name} had {x} {goods} and gave away {y} . how many {goods} are left ?",
         "of {x} {goods} in the shop , {y} were sold . how many {goods} remain ?",
         "today {name} counted {x} {goods} but lost {y} . how many does {name} still have ?"),
    ),
    Operation(
        "multiply", "*", "general", (range(2, 7), range(2, 11)),
        ("there are {x} boxes with {y} {goods} in each . how many {goods} are there ?",
         "each time {name} buys {y} {goods} on each of {x} days . how many {goods} is that ?",
         "each of {x} people has {y} {goods} . how many {goods} do they have together ?"),
    ),
)  # fmt: skip


@cache
def is_test_pair(x: int, y: int) -> bool:
    """Tell whether an unordered pair of numbers is held out for the test."""
    # Drawn from the text of the sorted pair, so that 3 + 7, 7 - 3 and 7 * 3 are in the same split,
    # whatever the order of generation. A model that learned 3 + 7 in training would otherwise know
    # the test's 7 + 3.
    low, high = sorted((x, y))
    return random.Random(f"pair {low} {high}").randrange(_TEST_BUCKETS) == 0


def apply_operation(operation: str, x: int, y: int) -> int:
    """Return the result of an operation on two numbers."""
    return {"add": x + y, "subtract": x - y, "multiply": x * y}[operation]


def draw_operands(rng: random.Random, operation: Operation, split: Split) -> tuple[int, int]:
    """Draw two operands of a split; a difference is always positive."""
    # Rejection leaves the operands of a split uniformly distributed.
    while True:
        x, y = (rng.choice(values) for values in operation.numbers)
        if is_test_pair(x, y) != (split == "test"):
            continue
        if operation.name != "subtract" or x != y:
            return (max(x, y), min(x, y)) if operation.name == "subtract" else (x, y)


def ask_mathqa(draw: DrawContext) -> WorldQuestion:
    """Ask a word problem of one operation."""
    rng = draw.rng
    operation = rng.choice(OPERATIONS)
    x, y = draw_operands(rng, operation, draw.split)
    name = rng.choice(entities_of_split(draw.world.people, draw.split)).name
    problem = rng.choice(operation.forms).format(x=x, y=y, name=name, goods=rng.choice(GOODS))
    answer, slot = apply_operation(operation.name, x, y), draw.number % 5
    options = insert_answer(str(answer), [str(n) for n in _wrong_options(rng, x, y, answer)], slot)
    document = {
        "Problem": problem,
        "Rationale": f"{x} {operation.sign} {y} = {answer} . answer {'abcde'[slot]}",
        "options": " , ".join(f"{c} ) {n}" for c, n in zip("abcde", options, strict=True)),
        "correct": "abcde"[slot],
        "annotated_formula": f"{operation.name}({x}, {y})",
        "linear_formula": f"{operation.name}(n0,n1)|",
        "category": operation.category,
    }
    return WorldQuestion(tuple(sorted((x, y))), problem, document)


def _wrong_options(rng: random.Random, x: int, y: int, answer: int) -> list[int]:
    # Wrong options are results of the remaining operations and numbers near the correct one. All
    # have as many digits as the correct one, and the number of options below it is drawn first, so
    # that neither length nor rank gives the answer away.
    same_length = range(1, 10) if answer < 10 else range(10, 100)
    mistakes = {abs(x - y), x + y, x * y} | {answer + step for step in _OPTION_OFFSETS}
    pool = sorted((mistakes & set(same_length) if answer >= 10 else set(same_length)) - {answer})
    below, above = [n for n in pool if n < answer], [n for n in pool if n > answer]
    count = rng.randint(max(0, 4 - len(above)), min(4, len(below)))
    return rng.sample(below, count) + rng.sample(above, 4 - count)


Facts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""By relation: all its values, and the wordings that ask for the value of an entity."""
_PERSON_FACTS: Facts = {
    "town": (
        vocabulary.TOWNS,
        (
            "Where does {name} live?",
            "In which town is the home of {name}?",
            "Which town is {name} at home in?",
        ),
    ),
    "job": (
        vocabulary.JOBS,
        (
            "What is the trade of {name}?",
            "What does {name} do for a living?",
            "As what does {name} earn money?",
        ),
    ),
    "pet": (
        vocabulary.PETS,
        (
            "Which animal does {name} keep?",
            "What kind of pet lives with {name}?",
            "What does {name} have for a pet?",
        ),
    ),
    "food": (
        vocabulary.FOODS,
        (
            "What does {name} like to eat most?",
            "Which dish would please {name}?",
            "What should we cook for {name}?",
        ),
    ),
    "hobby": (
        vocabulary.HOBBIES,
        (
            "How does {name} spend a free evening?",
            "What is the pastime of {name}?",
            "What does {name} do for fun?",
        ),
    ),
}
_SUBSTANCE_FACTS: Facts = {
    "colour": (
        vocabulary.COLOURS,
        (
            "What colour is {name}?",
            "Which colour does {name} have?",
            "In which colour does {name} come?",
        ),
    ),
    "source": (
        vocabulary.SOURCES,
        (
            "Where is {name} found?",
            "From what places does {name} come?",
            "Where must one look for {name}?",
        ),
    ),
}
_SHARE_OF_PEOPLE = 0.7
_TWO_HOPS: Facts = {
    "river": (
        vocabulary.RIVERS,
        (
            "Which river runs past the home of {name}?",
            "On what river is the town of {name}?",
            "At home, on which river does {name} row?",
        ),
    ),
    "ware": (
        vocabulary.WARES,
        (
            "What is the home town of {name} known for?",
            "Which ware does the town of {name} sell?",
            "What is made where {name} lives?",
        ),
    ),
    "tool": (
        tuple(vocabulary.JOB_TOOLS.values()),
        (
            "What does {name} need at work?",
            "Which tool belongs to the trade of {name}?",
            "What does {name} take along to work?",
        ),
    ),
}
_COMPARISONS = {
    "oldest": ("Who is the oldest of {names}?", "Of {names}, who was born first?"),
    "youngest": ("Who is the youngest of {names}?", "Of {names}, who was born last?"),
}
_SHARE_OF_COMPARISONS = 0.4

# In years: the answer of a comparison must stand clearly apart from the second.
_MIN_AGE_GAP = 12


def ask_arc_easy(draw: DrawContext) -> WorldQuestion:
    """Ask for one property of a person or a substance."""
    rng = draw.rng
    entity: Person | Substance
    if rng.random() < _SHARE_OF_PEOPLE:
        facts, entity = _PERSON_FACTS, rng.choice(entities_of_split(draw.world.people, draw.split))
    else:
        facts, entity = (
            _SUBSTANCE_FACTS,
            rng.choice(entities_of_split(draw.world.substances, draw.split)),
        )
    relation = rng.choice(list(facts))
    values, forms = facts[relation]
    answer = getattr(entity, relation)
    stem = rng.choice(forms).format(name=entity.name)
    document = arc_document(draw, stem, answer, distractors(rng, values, answer, 3))
    return WorldQuestion((entity.name, relation), stem, document)


def ask_arc_challenge(draw: DrawContext) -> WorldQuestion:
    """Ask for a fact that is two hops away, or for a comparison of four people."""
    return (
        _ask_comparison(draw) if draw.rng.random() < _SHARE_OF_COMPARISONS else _ask_two_hops(draw)
    )


def _ask_two_hops(draw: DrawContext) -> WorldQuestion:
    rng = draw.rng
    person = rng.choice(entities_of_split(draw.world.people, draw.split))
    town = draw.world.town(person.town)
    relation = rng.choice(list(_TWO_HOPS))
    values, forms = _TWO_HOPS[relation]
    known = {"river": town.river, "ware": town.ware, "tool": vocabulary.JOB_TOOLS[person.job]}
    stem = rng.choice(forms).format(name=person.name)
    document = arc_document(
        draw, stem, known[relation], distractors(rng, values, known[relation], 3)
    )
    return WorldQuestion((person.name, relation), stem, document)


def _ask_comparison(draw: DrawContext) -> WorldQuestion:
    rng = draw.rng
    kind = rng.choice(list(_COMPARISONS))
    answer, others = _people_of_clear_ages(draw, kind)
    names = [answer.name, *(person.name for person in others)]
    rng.shuffle(names)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    stem = rng.choice(_COMPARISONS[kind]).format(names=listed)
    document = arc_document(draw, stem, answer.name, [person.name for person in others])
    # A set, because the names in another order ask the same question.
    return WorldQuestion((kind, frozenset(names)), stem, document)


def _people_of_clear_ages(draw: DrawContext, kind: str) -> tuple[Person, list[Person]]:
    # Draw until one of the four is clearly the oldest or the youngest.
    candidates = entities_of_split(draw.world.people, draw.split)
    sign = -1 if kind == "oldest" else 1
    while True:
        people = draw.rng.sample(candidates, 4)
        first, second = sorted(sign * person.age for person in people)[:2]
        if second - first >= _MIN_AGE_GAP:
            answer = next(person for person in people if sign * person.age == first)
            return answer, [person for person in people if person is not answer]


_SITUATIONS = {
    "water": (
        "When a lump of {name} is dropped into a pond, it will",
        "A child throws some {name} into the sea. In the water it is going to",
        "Rain has filled the tub that the {name} lies in, so the {name} must",
        "In deep water a block of {name} can be seen to",
    ),
    "fire": (
        "If {name} is left in a hot oven, it will",
        "A cook puts {name} on the coals by mistake. Over the flames it is going to",
        "The shed with the {name} in it caught fire, so the {name} must",
        "On a blazing hearth a block of {name} can be seen to",
    ),
    "hammer": (
        "When a mason strikes {name} hard, it will",
        "A box of {name} falls down the stairs. On every step it is going to",
        "The smith brings the hammer down on the {name}, so the {name} must",
        "Thrown at a wall, a block of {name} can be seen to",
    ),
    "light": (
        "If {name} is laid out at noon, it will",
        "A window of {name} faces the morning sun. In the light it is going to",
        "The lamp was turned towards the {name}, so the {name} must",
        "Under a clear sky a block of {name} can be seen to",
    ),
}
_OUTCOMES = {
    "float": "float on top", "sink": "sink to the floor", "dissolve": "dissolve into it",
    "swell": "swell like bread", "burn": "burn to ash", "melt": "melt to a puddle",
    "glow": "glow for hours", "crack": "crack all over", "ring": "ring like a bell",
    "shatter": "shatter to bits", "bend": "bend and stay bent", "bounce": "bounce back up",
    "shine": "shine like gold", "fade": "fade to white", "sparkle": "sparkle like ice",
    "darken": "darken like ink",
}  # fmt: skip


def ask_openbookqa(draw: DrawContext) -> WorldQuestion:
    """Ask what happens to a substance in a situation."""
    rng = draw.rng
    substance = rng.choice(entities_of_split(draw.world.substances, draw.split))
    element = rng.choice(list(BEHAVIOURS))
    behaviour = getattr(substance, element)
    wrong = [_OUTCOMES[other] for other in distractors(rng, BEHAVIOURS[element], behaviour, 3)]
    stem = rng.choice(_SITUATIONS[element]).format(name=substance.name)
    document = arc_document(draw, stem, _OUTCOMES[behaviour], wrong)
    # OpenBookQA's schema is ARC's, but for the name of this field.
    document["question_stem"] = document.pop("question")
    return WorldQuestion((substance.name, element), stem, document)
