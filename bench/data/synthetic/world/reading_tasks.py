"""BoolQ and RTE of the closed world.

BoolQ: a passage about two people, and a yes/no question about the consequence of an event. The
answer is no if the passage has no such event or, harder to tell, if the event happened to the
second person.

RTE: whether the second sentence follows from the first. Each premise is about two people in
different roles. A false conclusion exchanges the roles or follows from a different premise, so no
conclusion is true or false by itself.
"""

from typing import NamedTuple

from bench.data.synthetic.world.entities import entities_of_split
from bench.data.synthetic.world.questions import DrawContext, WorldQuestion
from bench.data.synthetic.world.vocabulary import PLACES, THINGS

_FACT_SENTENCES = (
    "Today {name} went to the {place} with a {thing}.",
    "Later {name} took a {thing} to the {place}.",
    "With a {thing} under one arm, {name} walked to the {place}.",
    "All day {name} stayed at the {place} and had a {thing} along.",
    "At the {place}, {name} sat down and put away a {thing}.",
)


class _Event(NamedTuple):
    sentences: tuple[str, ...]
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


class PersonFact(NamedTuple):
    """A person, the place where they were, and the thing that they had along."""

    name: str
    place: str
    thing: str


def draw_person_facts(draw: DrawContext) -> list[PersonFact]:
    """Draw places and things for two people."""
    rng = draw.rng
    names = [
        person.name for person in rng.sample(entities_of_split(draw.world.people, draw.split), 2)
    ]
    return list(map(PersonFact, names, rng.sample(PLACES, 2), rng.sample(THINGS, 2)))


def fact_text(draw: DrawContext, facts: list[PersonFact]) -> str:
    """State the facts, each in a sentence of a different form."""
    forms = draw.rng.sample(_FACT_SENTENCES, len(facts))
    return " ".join(form.format(**fact._asdict()) for form, fact in zip(forms, facts, strict=True))


def ask_boolq(draw: DrawContext) -> WorldQuestion:
    """Tell an event of one person and something about a second one; ask about the first."""
    # The true and the false question have the same forms and the same name: only the passage
    # decides, and the label alternates with the number of the question.
    rng, label = draw.rng, draw.number % 2
    event, second, third = rng.sample(_EVENTS, 3)
    fact, other = draw_person_facts(draw)
    two = rng.random() < _SHARE_OF_TWO_EVENTS
    sentences = [
        rng.choice(event.sentences).format(**fact._asdict()),
        rng.choice(second.sentences if two else _FACT_SENTENCES).format(**other._asdict()),
    ]
    rng.shuffle(sentences)
    wrong = second if two and rng.random() < _SHARE_MIXED_UP else third
    question = rng.choice((event if label else wrong).questions).format(**fact._asdict())
    text = " ".join(sentences)
    document = {"question": question, "passage": text, "idx": draw.number, "label": label}
    return WorldQuestion(subject=text, key=(text, question), document=document)


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
_SHARE_SWAPPED = 0.35


class Entailment(NamedTuple):
    """A premise about two people, conclusions that follow from it, and two kinds that do not."""

    premise: str
    entailed: list[str]
    swapped: list[str]
    unrelated: list[str]


def draw_entailment(draw: DrawContext) -> Entailment:
    """Draw a premise, its conclusions, and conclusions with the wrong roles or relation."""
    rng = draw.rng
    relation, other = rng.sample(_RELATIONS, 2)
    a, b = (
        person.name for person in rng.sample(entities_of_split(draw.world.people, draw.split), 2)
    )
    words = {"thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    premise = rng.choice(relation.premises).format(a=a, b=b, **words)
    return Entailment(
        f"We heard that {premise}",
        [form.format(a=a, b=b, **words) for form in relation.conclusions],
        [form.format(a=b, b=a, **words) for form in relation.conclusions],
        [form.format(a=a, b=b, **words) for form in other.conclusions],
    )


def ask_rte(draw: DrawContext) -> WorldQuestion:
    """Ask whether a conclusion follows from a premise."""
    rng, label, telling = draw.rng, draw.number % 2, draw_entailment(draw)
    false = telling.swapped if rng.random() < _SHARE_SWAPPED else telling.unrelated
    conclusion = rng.choice(telling.entailed if label == 0 else false)
    premise = telling.premise
    # GLUE's labels: 0 is entailment, 1 is not.
    document = {"sentence1": premise, "sentence2": conclusion, "label": label, "idx": draw.number}
    return WorldQuestion(premise, (premise, conclusion), document)
