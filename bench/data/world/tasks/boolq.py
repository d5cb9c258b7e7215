"""BoolQ of the world: a passage about two people, and a yes/no question.

The question asks for the consequence of an event. The answer is no if the passage has no such event
or, harder to tell, if the event happened to the second person.
"""

from typing import NamedTuple

from bench.data.world.entities import of_split
from bench.data.world.lexicon import PLACES, THINGS
from bench.data.world.question import Draw, Question

_DOINGS = (
    "Today {name} went to the {place} with a {thing}.",
    "Later {name} took a {thing} to the {place}.",
    "With a {thing} under one arm, {name} walked to the {place}.",
    "All day {name} stayed at the {place} and had a {thing} along.",
    "At the {place}, {name} sat down and put away a {thing}.",
)


class _Event(NamedTuple):
    tellings: tuple[str, ...]
    questions: tuple[str, ...]


_EVENTS = (
    _Event(
        ("By the {place}, {name} slipped and fell into the river.",
         "The boat that {name} rowed turned over near the {place}."),
        ("did {name} get wet", "was {name} in the water", "did {name} need dry clothes"),
    ),
    _Event(
        ("In the race to the {place}, {name} came first.",
         "Nobody ran faster than {name} on the way to the {place}."),
        ("did {name} win", "was {name} the fastest", "did {name} earn a prize"),
    ),
    _Event(
        ("On a bench at the {place}, {name} left the {thing} and never found it.",
         "When {name} came to the {place}, the {thing} had dropped out of a pocket."),
        ("did {name} lose something", "was {name} missing a {thing}", "did {name} search in vain"),
    ),
    _Event(
        ("With a high fever, {name} lay down at the {place}.",
         "The doctor sent {name} home from the {place} to bed."),
        ("was {name} ill", "did {name} feel sick", "should {name} take medicine"),
    ),
    _Event(
        ("Hours after the bell, {name} came to the {place}.",
         "The coach to the {place} had gone when {name} got there."),
        ("was {name} late", "did others wait for {name}", "did {name} miss the hour"),
    ),
    _Event(
        ("On the stones of the {place}, {name} dropped the {thing}, and it shattered.",
         "The {thing} cracked in two when {name} sat on it at the {place}."),
        ("did {name} break something", "is the {thing} of {name} broken",
         "must {name} mend a {thing}"),
    ),
)  # fmt: skip

_SHARE_OF_TWO_EVENTS = 0.4
_SHARE_MIXED_UP = 0.8
"""Fraction of two-event passages whose false question is about the second person's event."""


class Doing(NamedTuple):
    """A person, the place where they were, and the thing that they had along."""

    name: str
    place: str
    thing: str


def doings(draw: Draw) -> list[Doing]:
    """Draw places and things for two people."""
    rng = draw.rng
    names = [person.name for person in rng.sample(of_split(draw.world.people, draw.split), 2)]
    return list(map(Doing, names, rng.sample(PLACES, 2), rng.sample(THINGS, 2)))


def passage(draw: Draw, facts: list[Doing]) -> str:
    """State the facts, each in a sentence of a different form."""
    forms = draw.rng.sample(_DOINGS, len(facts))
    return " ".join(form.format(**fact._asdict()) for form, fact in zip(forms, facts, strict=True))


def ask(draw: Draw) -> Question:
    """Tell an event of one person and something about a second one; ask about the first."""
    # The true and the false question have the same forms and the same name: only the passage
    # decides, and the label alternates with the number of the question.
    rng, label = draw.rng, draw.number % 2
    event, second, untold = rng.sample(_EVENTS, 3)
    fact, other = doings(draw)
    two = rng.random() < _SHARE_OF_TWO_EVENTS
    sentences = [
        rng.choice(event.tellings).format(**fact._asdict()),
        rng.choice(second.tellings if two else _DOINGS).format(**other._asdict()),
    ]
    rng.shuffle(sentences)
    wrong = second if two and rng.random() < _SHARE_MIXED_UP else untold
    question = rng.choice((event if label else wrong).questions).format(**fact._asdict())
    text = " ".join(sentences)
    document = {"question": question, "passage": text, "idx": draw.number, "label": label}
    return Question(subject=text, key=(text, question), document=document)
