"""A question in its data set's schema, and its text exactly as lm-eval's task files render it.

A model trained on these strings is scored on questions of the same form.
"""

import random
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.data.synthetic import Split
from bench.data.synthetic.world.entities import World

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
