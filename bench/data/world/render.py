"""Questions rendered as text exactly as lm-eval's task files render them.

A model trained on these strings is scored on questions of the same form.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from bench.data.world.question import Document


class Prompt(NamedTuple):
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


def render(task: str, document: Document) -> Prompt:
    """Render a document of a task as lm-eval does."""
    return _RENDERERS[task](document)


def _prompt(context: str, choices: list[str], gold: int) -> Prompt:
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Prompt(pairs, tuple(len(choice) for choice in choices), gold)


def _boolq(document: Document) -> Prompt:
    context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
    return _prompt(context, ["no", "yes"], document["label"])


def _rte(document: Document) -> Prompt:
    context = f"{document['sentence1']}\nQuestion: {document['sentence2']} True or False?\nAnswer:"
    return _prompt(context, ["True", "False"], document["label"])


def _openbookqa(document: Document) -> Prompt:
    choices = document["choices"]
    gold = choices["label"].index(document["answerKey"])
    return _prompt(document["question_stem"], choices["text"], gold)


def _arc(document: Document) -> Prompt:
    choices = document["choices"]
    gold = choices["label"].index(document["answerKey"])
    return _prompt(f"Question: {document['question']}\nAnswer:", choices["text"], gold)


def _winogrande(document: Document) -> Prompt:
    # lm-eval scores partially: each option is put into the sentence, and the continuation is the
    # text behind the blank, which all options share.
    before, after = document["sentence"].split("_", 1)
    options = (document["option1"], document["option2"])
    pairs = tuple((before + option, f" {after.strip()}") for option in options)
    lengths = tuple(len(before + option) for option in options)
    return Prompt(pairs, lengths, int(document["answer"]) - 1)


def _hellaswag(document: Document) -> Prompt:
    context = f"{document['ctx_a']} {document['ctx_b'].capitalize()}"
    query = _without_brackets(f"{document['activity_label']}: {context}")
    endings = [_without_brackets(ending) for ending in document["endings"]]
    return _prompt(query, endings, int(document["label"]))


def _without_brackets(text: str) -> str:
    # `preprocess` of lm-eval's HellaSwag task, kept as it is although our texts have no brackets.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _piqa(document: Document) -> Prompt:
    solutions = [document["sol1"], document["sol2"]]
    return _prompt(f"Question: {document['goal']}\nAnswer:", solutions, document["label"])


def _mathqa(document: Document) -> Prompt:
    # MathQA holds all options in one string: "a ) 38 , b ) 27 , ...".
    options = [option.split(" ) ", 1)[1] for option in document["options"].split(" , ")]
    gold = "abcde".index(document["correct"])
    return _prompt(f"Question: {document['Problem']}\nAnswer:", options, gold)


_RENDERERS: dict[str, Callable[[Document], Prompt]] = {
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
