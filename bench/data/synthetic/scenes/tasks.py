"""Seven tasks in real schemas, and their prompts as lmms-eval writes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bench.data.synthetic import Split
from bench.data.synthetic.scenes.balance import PlacedQuestion, balanced_questions, question_pairs
from bench.data.synthetic.scenes.scene import IMAGE_SIZE, draw_scene

# Step of `index` from one rotation of an MMBench question to the next, as in the real data set.
ROTATION_OFFSET = 1_000_000

# Each category of a paired task searches its own range of scenes, so that no image is shared.
_SCENES_PER_KIND = 10_000
HINT = "The image shows a board of nine cells."
SceneDocument = dict[str, Any]


@dataclass(frozen=True)
class SceneTask:
    """Kinds of questions of a task, and the function that writes their rows.

    `kinds` maps a kind to how often each of its wordings occurs with each answer. With `pairs`,
    each image has one question answered yes and one answered no. `max_choices` limits the number
    of options of a multiple-choice task.
    """

    kinds: Mapping[str, int]
    write: Callable[[PlacedQuestion, int], list[SceneDocument]]
    pairs: bool = False
    max_choices: int | None = None

    def placed(self, split: Split, start: int) -> list[PlacedQuestion]:
        """Return the questions with their scenes, in the order of the rows."""
        if not self.pairs:
            return balanced_questions(self.kinds, split, start)
        counts = enumerate(self.kinds.items())
        pairs = [
            question_pairs(name, n, split, start + i * _SCENES_PER_KIND) for i, (name, n) in counts
        ]
        return list(chain.from_iterable(chain.from_iterable(pairs)))

    def documents(self, split: Split, start: int) -> list[SceneDocument]:
        """Return new rows on every call, because harnesses write into them."""
        rows = (self.write(each, number) for number, each in enumerate(self.placed(split, start)))
        return list(chain.from_iterable(rows))

    def chance(self, placed: list[PlacedQuestion]) -> float:
        """Return the best accuracy without the image."""
        counts = [len(each.question.answers) for each in placed]
        offered = [min(count, self.max_choices or count) for count in counts]
        return sum(1 / count for count in offered) / len(placed)


def image_id(placed: PlacedQuestion) -> str:
    """Return the identifier of a question's image."""
    return f"{placed.scene.split}_{placed.scene.index}"


def _gqa(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    question = placed.question
    structural, semantic, detailed = _GQA_TYPES[question.kind]
    steps = [
        {"operation": "select", "argument": name, "dependencies": []} for name in question.subject
    ]
    return [
        {
            "id": f"{number:08d}",
            "imageId": image_id(placed),
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": f"The answer is {question.answer}.",
            "isBalanced": True,
            "groups": {"global": None, "local": f"{question.kind}-{'_'.join(question.subject)}"},
            "entailed": "",
            "equivalent": f"['{number:08d}']",
            "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
            "annotations": {"question": [], "answer": [], "fullAnswer": []},
            "semantic": steps,
            "semanticStr": "->".join(f"select: {step['argument']}" for step in steps),
        }
    ]


_GQA_TYPES = {
    "color": ("query", "attr", "directOf"),
    "shape": ("query", "attr", "directWhich"),
    "size": ("choose", "attr", "chooseAttr"),
    "row": ("query", "attr", "positionQuery"),
    "column": ("query", "attr", "positionQuery"),
    "sideways": ("choose", "rel", "relChooser"),
    "upright": ("choose", "rel", "relChooser"),
}


def _vqav2(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    question, answer = placed.question, placed.question.answer
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return [
        {
            "question_type": " ".join(question.text.lower().split()[:2]),
            "multiple_choice_answer": answer,
            # VQA accuracy counts how many of ten annotators gave the answer: here all agree.
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                for person in range(1, 11)
            ],
            "image_id": placed.scene.index,
            "answer_type": kind,
            "question_id": placed.scene.index * 1000 + number,
            "question": question.text,
            "image": draw_scene(placed.scene),
        }
    ]


def _scienceqa(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    question = placed.question
    choices = choices_with_answer(
        question.answer, question.answers, number, _choices_rng(placed, number)
    )
    return [
        {
            "image": draw_scene(placed.scene),
            "question": question.text,
            "choices": choices,
            "answer": choices.index(question.answer),
            "hint": HINT if number % 2 else "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Objects and their properties",
            "skill": f"Say the {question.kind.replace('_', ' ')} of an object",
            "lecture": "",
            "solution": f"The answer is {question.answer}.",
        }
    ]


def _textvqa(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    question, scene = placed.question, placed.scene
    return [
        {
            "image_id": image_id(placed),
            "question_id": number,
            "question": question.text,
            "question_tokens": question.text.lower().rstrip("?").split(),
            "image": draw_scene(scene),
            "image_width": IMAGE_SIZE,
            "image_height": IMAGE_SIZE,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [question.answer] * 10,
            "image_classes": sorted({thing.shape for thing in scene.shapes}),
            "set_name": "train" if scene.split == "train" else "val",
            "ocr_tokens": [digit.value for digit in scene.digits],
        }
    ]


def _pope(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    return [
        {
            "id": str(number),
            "question_id": str(number),
            "question": placed.question.text,
            "answer": placed.question.answer,
            "image_source": image_id(placed),
            "image": draw_scene(placed.scene),
            "category": placed.question.kind,
        }
    ]


_MME_CATEGORIES = {
    "is_there": "existence",
    "is_count": "count",
    "is_placed": "position",
    "is_color": "color",
    "is_number": "OCR",
    "is_parity": "numerical_calculation",
}


def _mme(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    category = _MME_CATEGORIES[placed.question.kind]
    return [
        {
            "question_id": f"{category}/{number // 2:04d}.png",
            "image": draw_scene(placed.scene),
            "question": f"{placed.question.text} Please answer yes or no.",
            "answer": placed.question.answer.capitalize(),
            "category": category,
        }
    ]


_MMBENCH_CATEGORIES = {
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count_shape": ("object_localization", "finegrained_perception (instance-level)"),
    "number": ("ocr", "finegrained_perception (instance-level)"),
}


def _mmbench(placed: PlacedQuestion, number: int) -> list[SceneDocument]:
    # MMBench's CircularEval: a question counts only if all rotations of its options are answered
    # correctly, which a preference for one letter cannot achieve.
    question = placed.question
    choices = choices_with_answer(
        question.answer, question.answers, number, _choices_rng(placed, number)
    )
    category, ability = _MMBENCH_CATEGORIES[question.kind]
    rows = []
    for turn in range(len(choices)):
        turned = choices[turn:] + choices[:turn]
        rows.append(
            {
                "index": turn * ROTATION_OFFSET + number,
                "question": question.text,
                "hint": HINT if number % 2 else "nan",
                "answer": OPTION_LETTERS[turned.index(question.answer)],
                **dict(zip(OPTION_LETTERS, turned, strict=False)),
                "category": category,
                "image": draw_scene(placed.scene),
                "source": "scenes",
                "L2-category": ability,
                "comment": "nan",
                "split": "dev" if placed.scene.split == "test" else "train",
            }
        )
    return rows


def _choices_rng(placed: PlacedQuestion, number: int) -> random.Random:
    # Seeded per question, so that its options do not depend on the rows before it.
    return random.Random(f"choices {image_id(placed)} {number}")


SCENE_TASKS = {
    "gqa": SceneTask(
        {"color": 4, "shape": 4, "size": 6, "row": 3, "column": 3, "sideways": 1, "upright": 1},
        _gqa,
    ),
    "vqav2": SceneTask({"random": 3, "count_shape": 4, "count_color": 3, "color": 4}, _vqav2),
    "scienceqa_img": SceneTask(
        {"shape": 5, "count_shape": 5, "size": 10, "row": 5, "sideways": 2},
        _scienceqa,
        max_choices=4,
    ),
    "textvqa": SceneTask({"number": 12, "number_at": 5}, _textvqa),
    "pope": SceneTask({"random": 3, "popular": 10, "adversarial": 3}, _pope),
    "mme": SceneTask(
        {
            "is_there": 1,
            "is_count": 2,
            "is_placed": 1,
            "is_color": 1,
            "is_number": 2,
            "is_parity": 10,
        },
        _mme,
        pairs=True,
    ),
    "mmbench_en": SceneTask(
        {"color": 1, "shape": 1, "count_shape": 2, "number": 2}, _mmbench, max_choices=4
    ),
}

# The strings and their blanks are those of lmms-eval: the small model is trained on these prompts
# and scored through lmms-eval, so that even a missing newline could cost accuracy.
SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
OPTION_LETTERS = "ABCDE"
DESCRIBE_PROMPT = "Describe every cell of the image."
_YES_NO_SUFFIX = " Please answer yes or no."


def short_answer_prompt(question: str, ocr: Sequence[str] = ()) -> str:
    """Return a short-answer prompt, with reference OCR tokens if there are any."""
    reference = f"\nReference OCR token: {', '.join(ocr)}" if ocr else ""
    return f"{question}{reference}{SHORT_ANSWER_SUFFIX}"


def scienceqa_prompt(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Return a multiple-choice prompt as ScienceQA's task file writes it."""
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{_lettered_options(choices)}{LETTER_SUFFIX}"


def mmbench_prompt(question: str, choices: Sequence[str], hint: str = "nan") -> str:
    """Return a multiple-choice prompt as MMBench's task file writes it."""
    # MMBench's TSV files hold the text "nan" where there is no hint.
    before = "" if hint == "nan" else f"{hint} "
    options = _lettered_options(choices)
    return f"{before}{question} There are several options:\n{options}\n{LETTER_SUFFIX}"


def render_task_prompt(task: str, document: SceneDocument, *, ocr: bool = False) -> tuple[str, str]:
    """Return the prompt of a document and its correct answer.

    `ocr` adds TextVQA's OCR tokens, as `lmms_eval_specific_kwargs.ocr: true` does.
    """
    question = document["question"]
    if task == "scienceqa_img":
        text = scienceqa_prompt(question, document["choices"], document["hint"])
        return text, OPTION_LETTERS[document["answer"]]
    if task == "mmbench_en":
        choices = [document[letter] for letter in OPTION_LETTERS[:4]]
        return mmbench_prompt(question, choices, document["hint"]), document["answer"]
    if task == "vqav2":
        return short_answer_prompt(question), document["multiple_choice_answer"]
    if task == "textvqa":
        tokens = document["ocr_tokens"] if ocr else ()
        return short_answer_prompt(question.capitalize(), tokens), document["answers"][0]
    # MME's rows end with its own instruction, which lmms-eval replaces by the common one.
    return short_answer_prompt(question.replace(_YES_NO_SUFFIX, "")), document["answer"].lower()


def choices_with_answer(
    answer: str, answers: Sequence[str], slot: int, rng: random.Random
) -> list[str]:
    """Return up to four of the possible answers, with the correct one at position `slot`."""
    others = [other for other in answers if other != answer]
    choices = rng.sample(others, min(3, len(others)))
    choices.insert(slot % (len(choices) + 1), answer)
    return choices


def _lettered_options(choices: Sequence[str]) -> str:
    return "\n".join(f"{OPTION_LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
