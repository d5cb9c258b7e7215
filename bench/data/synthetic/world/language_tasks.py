"""BoolQ, RTE, HellaSwag, PIQA and WinoGrande of the closed world.

BoolQ: a passage about two people, and a yes/no question about the consequence of an event. The
answer is no if the passage has no such event or, harder to tell, if the event happened to the
second person.

RTE: whether the second sentence follows from the first. Each premise is about two people in
different roles. A false conclusion exchanges the roles or follows from a different premise, so no
conclusion is true or false by itself.
"""

from typing import NamedTuple

from bench.data.synthetic import Split
from bench.data.synthetic.world.entities import (
    DrawContext,
    Routine,
    WorldQuestion,
    entities_of_split,
    insert_answer,
)
from bench.data.synthetic.world.vocabulary import MATERIALS, PLACES, THINGS, TOOLS

_ROUTINE_OPENINGS = (
    "Here {name} the {worker} is making {product}.",
    "Today {name} the {worker} wants to finish {product}.",
    "Now {name}, a {worker}, starts on {product}.",
)
_STEPS_SO_FAR = (
    "First {pronoun} {steps}.",
    "So far {pronoun} {steps}.",
    "In the morning {pronoun} {steps}.",
)
_NEXT_STEP_LEADS = ("then {pronoun}", "after that {pronoun}", "next {pronoun}")


def ask_hellaswag(draw: DrawContext) -> WorldQuestion:
    """Ask for the step that follows the first steps of a routine."""
    rng = draw.rng
    routine = rng.choice(entities_of_split(draw.world.routines, draw.split))
    person = rng.choice(entities_of_split(draw.world.people, draw.split))
    done = rng.randrange(1, len(routine.steps))
    words = {"name": person.name, "pronoun": person.pronoun, "product": routine.product}
    opening = rng.choice(_ROUTINE_OPENINGS).format(worker=routine.craft.worker, **words)
    so_far = rng.choice(_STEPS_SO_FAR).format(steps=" and ".join(routine.steps[:done]), **words)
    slot = draw.number % 4
    document = {
        "ind": draw.number,
        "activity_label": f"Making {routine.product.split(' ', 1)[1]}",
        "ctx_a": f"{opening} {so_far}",
        "ctx_b": rng.choice(_NEXT_STEP_LEADS).format(**words),
        "endings": [f"{step}." for step in insert_answer(*_next_step_choices(routine, done), slot)],
        "source_id": f"world~{draw.ident}",
        "split": "train" if draw.split == "train" else "val",
        "split_type": "indomain" if draw.split == "train" else "zeroshot",
        "label": str(slot),
    }
    document["ctx"] = f"{document['ctx_a']} {document['ctx_b']}"
    return WorldQuestion((routine.product, done), (document["ctx"], done), document)


def _next_step_choices(routine: Routine, done: int) -> tuple[str, list[str]]:
    # All endings are steps of the same craft and stage, so that none is implausible by itself.
    answer = routine.steps[done]
    return answer, [step for step in routine.craft.stages[done] if step != answer]


_GOALS = (
    "To {job} the {thing},",
    "How do you {job} the {thing}?",
    "Someone wants to {job} the old {thing}.",
    "What is the way to {job} this {thing}?",
)
_SOLUTIONS = ("use the {tool}.", "reach for the {tool}.", "work with the {tool}.")


def ask_piqa(draw: DrawContext) -> WorldQuestion:
    """Ask for the tool for a job on an object."""
    # The wrong tool does the same job on a different material: the job alone does not decide.
    rng = draw.rng
    thing = rng.choice(entities_of_split(draw.world.objects, draw.split))
    job = rng.choice(list(TOOLS))
    right = MATERIALS.index(thing.material)
    wrong = rng.choice([i for i in range(len(MATERIALS)) if i != right])
    goal = rng.choice(_GOALS).format(job=job, thing=thing.name)
    form, label = rng.choice(_SOLUTIONS), draw.number % 2
    solutions = [form.format(tool=TOOLS[job][material]) for material in (right, wrong)]
    if label == 1:
        solutions.reverse()
    document = {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label}
    return WorldQuestion((thing.name, job), goal, document)


class _Situation(NamedTuple):
    """Openings with two roles, and clauses that fit only one of the roles."""

    openings: tuple[str, ...]
    of_a: tuple[str, ...]
    of_b: tuple[str, ...]


_PEOPLE_SITUATIONS = (
    _Situation(
        ("{a} gave the {thing} to {b} because", "{b} got the {thing} from {a} because",
         "{a} handed {b} the {thing} because"),
        ("no longer needed it", "had two of them", "was moving house"),
        ("had asked for it", "wanted to try it", "had a birthday"),
    ),
    _Situation(
        ("{a} carried {b} home because", "{b} was carried by {a} because",
         "{a} lifted {b} up because"),
        ("was very strong", "had broad shoulders", "was willing to help"),
        ("could not walk", "had hurt a foot", "was fast asleep"),
    ),
    _Situation(
        ("{a} lent money to {b} because", "{b} borrowed money from {a} because",
         "{a} paid for {b} because"),
        ("was rich", "had plenty to spare", "earned a good wage"),
        ("was poor", "had an empty purse", "could not pay the rent"),
    ),
    _Situation(
        ("{a} sold the {thing} to {b} because", "{b} bought the {thing} from {a} because",
         "{a} let {b} have the {thing} at a price because"),
        ("was short of cash", "wanted to be rid of it", "was closing the shop"),
        ("was a keen collector", "had looked for one", "liked the look of it"),
    ),
)  # fmt: skip
_ROLE_SITUATIONS = (
    (
        ("the nurse", "the patient"),
        _Situation(
            ("{a} called on {b} because", "{b} was washed by {a} because",
             "{a} brought {b} some pills because"),
            ("was on duty that night", "had a medicine chest", "knew about wounds"),
            ("had a fever", "was in great pain", "could not get up"),
        ),
    ),
    (
        ("the teacher", "the pupil"),
        _Situation(
            ("{a} praised {b} because", "{b} read aloud to {a} because",
             "{a} gave {b} a book because"),
            ("wanted to be kind", "corrected every mistake", "liked to explain things"),
            ("had learned the poem", "was the best in class", "had done the homework"),
        ),
    ),
    (
        ("the thief", "the watchman"),
        _Situation(
            ("{a} ran from {b} because", "{b} went after {a} because",
             "{a} slipped past {b} because"),
            ("had a stolen purse", "did not want to be caught", "was afraid of jail"),
            ("had heard a noise", "guarded the gate", "carried a lantern and a whistle"),
        ),
    ),
    (
        ("the guide", "the stranger"),
        _Situation(
            ("{a} walked with {b} because", "{b} followed {a} because",
             "{a} drew a map for {b} because"),
            ("had lived there for years", "knew each path", "earned money that way"),
            ("was lost", "had never been there", "could not read the signs"),
        ),
    ),
    (
        ("the cook", "the guest"),
        _Situation(
            ("{a} served {b} because", "{b} waited for {a} because",
             "{a} came out to {b} because"),
            ("had made a stew", "was proud of the roast", "ran the kitchen"),
            ("was hungry", "had ordered a meal", "sat at the table"),
        ),
    ),
    (
        ("the drum", "the suitcase"),
        _Situation(
            ("{a} did not fit in {b} because", "{b} could not hold {a} because",
             "{a} stuck out of {b} because"),
            ("was too big", "was round and wide", "made too much of a bulge"),
            ("was too small", "was full of shirts", "would not close any more"),
        ),
    ),
)  # fmt: skip
"""Situations in which nouns, instead of their places in the sentence, distinguish the roles."""
_SITUATIONS = (*_PEOPLE_SITUATIONS, *(situation for _, situation in _ROLE_SITUATIONS))


class _WinograndeCase(NamedTuple):
    """Everything that determines a sentence."""

    situation: int
    opening: int
    clause: int
    role: int
    a: str
    b: str
    thing: str
    place: str


def ask_winogrande(draw: DrawContext) -> WorldQuestion:
    """Ask whom a clause is about; two consecutive questions are twins with opposite answers."""
    # As in the real data set, twins differ in the clause only, so that the people alone predict
    # nothing. Keys enter in pairs of twins: the twin of a new case is new as well, and `collect`
    # never rejects it. It could not draw another one, because a twin is not random.
    case = _twin_case(draw.previous) if draw.previous and draw.number % 2 else _draw_case(draw)
    situation = _SITUATIONS[case.situation]
    words = {"a": case.a, "b": case.b, "thing": case.thing}
    start = f"Once at the {case.place} {situation.openings[case.opening].format(**words)}"
    clause = (situation.of_a, situation.of_b)[case.role][case.clause]
    answer, other = (case.a, case.b) if case.role == 0 else (case.b, case.a)
    slot = draw.number % 2
    first, second = (answer, other) if slot == 0 else (other, answer)
    document = {
        "sentence": f"{start} _ {clause}.",
        "option1": first,
        "option2": second,
        "answer": str(slot + 1),
    }
    return WorldQuestion((case.situation, case.opening, case.clause), case, document)


def _draw_case(draw: DrawContext) -> _WinograndeCase:
    rng = draw.rng
    opening, clause = rng.choice(_opening_clause_pairs(draw.split))
    situation = rng.randrange(len(_SITUATIONS))
    people = [
        person.name for person in rng.sample(entities_of_split(draw.world.people, draw.split), 2)
    ]
    role = situation - len(_PEOPLE_SITUATIONS)
    a, b = people if role < 0 else _ROLE_SITUATIONS[role][0]
    thing = rng.choice(THINGS) if role < 0 else ""
    side, where = rng.randrange(2), rng.choice(PLACES)
    return _WinograndeCase(situation, opening, clause, side, a, b, thing, where)


def _twin_case(question: WorldQuestion) -> _WinograndeCase:
    case = question.key
    if not isinstance(case, _WinograndeCase):
        raise TypeError("the previous question is not a WinoGrande question")
    return case._replace(role=1 - case.role)


def _opening_clause_pairs(split: Split) -> list[tuple[int, int]]:
    # A 3 x 3 Latin square of openings and clauses, one diagonal of which is the test split: all
    # openings and all clauses occur in training, but not the combinations of the test.
    square = [(opening, clause) for opening in range(3) for clause in range(3)]
    return [(o, c) for o, c in square if ((o + c) % 3 == 0) == (split == "test")]


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
