"""ARC of the world: one-hop facts (easy), two-hop facts and comparisons (challenge)."""

from collections.abc import Mapping, Sequence

from bench.data.world import lexicon
from bench.data.world.entities import Person, Substance, of_split
from bench.data.world.question import Draw, Question, distractors, exam

Facts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""By relation: all its values, and the wordings that ask for the value of an entity."""

_PERSON_FACTS: Facts = {
    "town": (
        lexicon.TOWNS,
        (
            "Where does {name} live?",
            "In which town is the home of {name}?",
            "Which town is {name} at home in?",
        ),
    ),
    "job": (
        lexicon.JOBS,
        (
            "What is the trade of {name}?",
            "What does {name} do for a living?",
            "As what does {name} earn money?",
        ),
    ),
    "pet": (
        lexicon.PETS,
        (
            "Which animal does {name} keep?",
            "What kind of pet lives with {name}?",
            "What does {name} have for a pet?",
        ),
    ),
    "food": (
        lexicon.FOODS,
        (
            "What does {name} like to eat most?",
            "Which dish would please {name}?",
            "What should we cook for {name}?",
        ),
    ),
    "hobby": (
        lexicon.HOBBIES,
        (
            "How does {name} spend a free evening?",
            "What is the pastime of {name}?",
            "What does {name} do for fun?",
        ),
    ),
}
_SUBSTANCE_FACTS: Facts = {
    "colour": (
        lexicon.COLOURS,
        (
            "What colour is {name}?",
            "Which colour does {name} have?",
            "In which colour does {name} come?",
        ),
    ),
    "source": (
        lexicon.SOURCES,
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
        lexicon.RIVERS,
        (
            "Which river runs past the home of {name}?",
            "On what river is the town of {name}?",
            "At home, on which river does {name} row?",
        ),
    ),
    "ware": (
        lexicon.WARES,
        (
            "What is the home town of {name} known for?",
            "Which ware does the town of {name} sell?",
            "What is made where {name} lives?",
        ),
    ),
    "tool": (
        tuple(lexicon.JOB_TOOLS.values()),
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
_LEAST_GAP = 12


def ask_easy(draw: Draw) -> Question:
    """Ask for one property of a person or a substance."""
    rng = draw.rng
    entity: Person | Substance
    if rng.random() < _SHARE_OF_PEOPLE:
        facts, entity = _PERSON_FACTS, rng.choice(of_split(draw.world.people, draw.split))
    else:
        facts, entity = _SUBSTANCE_FACTS, rng.choice(of_split(draw.world.substances, draw.split))
    relation = rng.choice(list(facts))
    values, forms = facts[relation]
    answer = getattr(entity, relation)
    stem = rng.choice(forms).format(name=entity.name)
    document = exam(draw, stem, answer, distractors(rng, values, answer, 3))
    return Question((entity.name, relation), stem, document)


def ask_challenge(draw: Draw) -> Question:
    """Ask for a fact that is two hops away, or for a comparison of four people."""
    return _compare(draw) if draw.rng.random() < _SHARE_OF_COMPARISONS else _two_hops(draw)


def _two_hops(draw: Draw) -> Question:
    rng = draw.rng
    person = rng.choice(of_split(draw.world.people, draw.split))
    town = draw.world.town(person.town)
    relation = rng.choice(list(_TWO_HOPS))
    values, forms = _TWO_HOPS[relation]
    known = {"river": town.river, "ware": town.ware, "tool": lexicon.JOB_TOOLS[person.job]}
    stem = rng.choice(forms).format(name=person.name)
    document = exam(draw, stem, known[relation], distractors(rng, values, known[relation], 3))
    return Question((person.name, relation), stem, document)


def _compare(draw: Draw) -> Question:
    rng = draw.rng
    kind = rng.choice(list(_COMPARISONS))
    answer, others = _four_ages(draw, kind)
    names = [answer.name, *(person.name for person in others)]
    rng.shuffle(names)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    stem = rng.choice(_COMPARISONS[kind]).format(names=listed)
    document = exam(draw, stem, answer.name, [person.name for person in others])
    # A set, because the names in another order ask the same question.
    return Question((kind, frozenset(names)), stem, document)


def _four_ages(draw: Draw, kind: str) -> tuple[Person, list[Person]]:
    # Draw until one of the four is clearly the oldest or the youngest.
    candidates = of_split(draw.world.people, draw.split)
    sign = -1 if kind == "oldest" else 1
    while True:
        people = draw.rng.sample(candidates, 4)
        first, second = sorted(sign * person.age for person in people)[:2]
        if second - first >= _LEAST_GAP:
            answer = next(person for person in people if sign * person.age == first)
            return answer, [person for person in people if person is not answer]
