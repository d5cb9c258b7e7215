"""RTE of the world: whether the second sentence follows from the first.

Each premise is about two people in different roles. A false conclusion exchanges the roles or
follows from a different premise, so no conclusion is true or false by itself.
"""

from typing import NamedTuple

from bench.data.world.entities import of_split
from bench.data.world.lexicon import PLACES, THINGS
from bench.data.world.question import Draw, Question


class _Relation(NamedTuple):
    premises: tuple[str, ...]
    conclusions: tuple[str, ...]


_RELATIONS = (
    _Relation(
        ("{a} sold the {thing} to {b} at the {place}.",
         "at the {place}, {b} was sold a {thing} by {a}."),
        ("{b} bought the {thing}.", "{a} got money for the {thing}.", "{a} sold the {thing}."),
    ),
    _Relation(
        ("{a} taught {b} how to use a {thing}.",
         "{b} learned at the {place} from {a}."),
        ("{b} was a pupil of {a}.", "{a} was the teacher.", "{b} learned from {a}."),
    ),
    _Relation(
        ("{a} reached the {place} an hour before {b} did.",
         "{b} came to the {place} long after {a}."),
        ("{a} arrived first.", "{b} was later than {a}.", "{a} had to wait for {b}."),
    ),
    _Relation(
        ("{a} is a head taller than {b}.",
         "{b} has to look up at {a} in the {place}."),
        ("{b} is shorter than {a}.", "{a} is the tall one.", "{a} is taller than {b}."),
    ),
    _Relation(
        ("{a} beat {b} in the race to the {place}.",
         "{b} lost the {thing} in a bet with {a}."),
        ("{a} won.", "{b} was beaten by {a}.", "{b} is the loser."),
    ),
    _Relation(
        ("{a} hired {b} to guard the {place}.",
         "{b} gets wages from {a} for carrying a {thing}."),
        ("{a} pays {b}.", "{b} works for {a}.", "{b} is the servant."),
    ),
)  # fmt: skip
_SHARE_EXCHANGED = 0.35


class Telling(NamedTuple):
    """A premise about two people, conclusions that follow from it, and two kinds that do not."""

    premise: str
    conclusions: list[str]
    exchanged: list[str]
    beside_the_point: list[str]


def telling(draw: Draw) -> Telling:
    """Draw a premise, its conclusions, and conclusions with the wrong roles or relation."""
    rng = draw.rng
    relation, other = rng.sample(_RELATIONS, 2)
    a, b = (person.name for person in rng.sample(of_split(draw.world.people, draw.split), 2))
    words = {"thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    premise = rng.choice(relation.premises).format(a=a, b=b, **words)
    return Telling(
        f"We heard that {premise}",
        [form.format(a=a, b=b, **words) for form in relation.conclusions],
        [form.format(a=b, b=a, **words) for form in relation.conclusions],
        [form.format(a=a, b=b, **words) for form in other.conclusions],
    )


def ask(draw: Draw) -> Question:
    """Ask whether a conclusion follows from a premise."""
    rng, label, told = draw.rng, draw.number % 2, telling(draw)
    false = told.exchanged if rng.random() < _SHARE_EXCHANGED else told.beside_the_point
    conclusion = rng.choice(told.conclusions if label == 0 else false)
    premise = told.premise
    # GLUE's labels: 0 is entailment, 1 is not.
    document = {"sentence1": premise, "sentence2": conclusion, "label": label, "idx": draw.number}
    return Question(premise, (premise, conclusion), document)
