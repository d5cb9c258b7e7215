"""Prompts of the scene tasks, worded as lmms-eval's task files word them by default."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]

# The strings and their blanks are those of lmms-eval: the small model is trained on these prompts
# and scored through lmms-eval, so that even a missing newline could cost accuracy.
BRIEF = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
DESCRIBE = "Describe every cell of the image."
_ASKED = " Please answer yes or no."


def brief(question: str, ocr: Sequence[str] = ()) -> str:
    """Return a short-answer prompt, with reference OCR tokens if there are any."""
    reference = f"\nReference OCR token: {', '.join(ocr)}" if ocr else ""
    return f"{question}{reference}{BRIEF}"


def science(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Return a multiple-choice prompt as ScienceQA's task file writes it."""
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{_lettered(choices)}{LETTER}"


def options(question: str, choices: Sequence[str], hint: str = "nan") -> str:
    """Return a multiple-choice prompt as MMBench's task file writes it."""
    # MMBench's TSV files hold the text "nan" where there is no hint.
    before = "" if hint == "nan" else f"{hint} "
    return f"{before}{question} There are several options:\n{_lettered(choices)}\n{LETTER}"


def render(task: str, document: Document, *, ocr: bool = False) -> tuple[str, str]:
    """Return the prompt of a document and its correct answer.

    `ocr` adds TextVQA's OCR tokens, as `lmms_eval_specific_kwargs.ocr: true` does.
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
    # MME's rows end with its own instruction, which lmms-eval replaces by the common one.
    return brief(question.replace(_ASKED, "")), document["answer"].lower()


def place(answer: str, answers: Sequence[str], slot: int, rng: random.Random) -> list[str]:
    """Return up to four of the possible answers, with the correct one at position `slot`."""
    others = [other for other in answers if other != answer]
    choices = rng.sample(others, min(3, len(others)))
    choices.insert(slot % (len(choices) + 1), answer)
    return choices


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
