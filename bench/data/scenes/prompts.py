"""The text of a question as lmms-eval's task files put it to a model by default."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]

BRIEF = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
DESCRIBE = "Describe every cell of the image."
_ASKED = " Please answer yes or no."


def brief(question: str, ocr: Sequence[str] = ()) -> str:
    """Return a question to be answered in a word, with OCR tokens where there are any."""
    reference = f"\nReference OCR token: {', '.join(ocr)}" if ocr else ""
    return f"{question}{reference}{BRIEF}"


def science(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Return a multiple-choice question as ScienceQA's task file writes it."""
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{_lettered(choices)}{LETTER}"


def options(question: str, choices: Sequence[str], hint: str = "nan") -> str:
    """Return a multiple-choice question as MMBench's task file writes it."""
    before = "" if hint == "nan" else f"{hint} "
    return f"{before}{question} There are several options:\n{_lettered(choices)}\n{LETTER}"


def render(task: str, document: Document, *, ocr: bool = False) -> tuple[str, str]:
    """Return what a model is asked for a document and the answer that is right.

    `ocr` gives TextVQA's OCR tokens, as `lmms_eval_specific_kwargs.ocr: true` does.
    """
    question = document["question"]
    if task == "scienceqa_img":
        text = science(question, document["choices"], document["hint"])
        return text, LETTERS[document["answer"]]
    if task == "mmbench_en":
        choices = [document[letter] for letter in LETTERS[:4]]
        return options(question, choices, document["hint"]), document["answer"]
    if task == "vqav2":
        return brief(question), document["multiple_choice_answer"]
    if task == "textvqa":
        tokens = document["ocr_tokens"] if ocr else ()
        return brief(question.capitalize(), tokens), document["answers"][0]
    return brief(question.replace(_ASKED, "")), document["answer"].lower()


def place(answer: str, answers: Sequence[str], slot: int, rng: random.Random) -> list[str]:
    """Return up to four of the possible answers, with the right one at position `slot`."""
    others = [other for other in answers if other != answer]
    choices = rng.sample(others, min(3, len(others)))
    choices.insert(slot % (len(choices) + 1), answer)
    return choices


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
