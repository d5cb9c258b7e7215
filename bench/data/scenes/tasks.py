"""Seven tasks about scenes, with the kinds of their questions and the schemas of real data sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from bench.data.scenes.balance import Placed, balanced, paired
from bench.data.scenes.prompts import LETTERS, Document, place
from bench.data.scenes.render import SIZE, render
from bench.data.scenes.scene import Split

# Step of `index` from one rotation of an MMBench question to the next, as in the real data set.
ROTATION = 1_000_000
# Each category of a paired task searches its own range of scenes, so that no image is shared.
_KIND_RANGE = 10_000
_HINT = "The image shows a board of nine cells."


@dataclass(frozen=True)
class Task:
    """Kinds of questions of a task, and the function that writes their rows.

    `kinds` maps a kind to how often each of its wordings occurs with each answer. With `pairs`,
    each image has one question answered yes and one answered no. `most_choices` limits the number
    of options of a multiple-choice task.
    """

    kinds: Mapping[str, int]
    write: Callable[[Placed, int], list[Document]]
    pairs: bool = False
    most_choices: int | None = None

    def placed(self, split: Split, start: int) -> list[Placed]:
        """Return the questions with their scenes, in the order of the rows."""
        if not self.pairs:
            return balanced(self.kinds, split, start)
        counts = enumerate(self.kinds.items())
        pairs = [paired(name, n, split, start + i * _KIND_RANGE) for i, (name, n) in counts]
        return list(chain.from_iterable(chain.from_iterable(pairs)))

    def documents(self, split: Split, start: int) -> list[Document]:
        """Return new rows on every call, because harnesses write into them."""
        rows = (self.write(each, number) for number, each in enumerate(self.placed(split, start)))
        return list(chain.from_iterable(rows))

    def chance(self, placed: list[Placed]) -> float:
        """Return the best accuracy without the image."""
        counts = [len(each.question.answers) for each in placed]
        offered = [min(count, self.most_choices or count) for count in counts]
        return sum(1 / count for count in offered) / len(placed)


def image_id(placed: Placed) -> str:
    """Return the identifier of a question's image."""
    return f"{placed.scene.split}_{placed.scene.index}"


def _gqa(placed: Placed, number: int) -> list[Document]:
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


def _vqav2(placed: Placed, number: int) -> list[Document]:
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
            "image": render(placed.scene),
        }
    ]


def _scienceqa(placed: Placed, number: int) -> list[Document]:
    question = placed.question
    choices = place(question.answer, question.answers, number, _draw(placed, number))
    return [
        {
            "image": render(placed.scene),
            "question": question.text,
            "choices": choices,
            "answer": choices.index(question.answer),
            "hint": _HINT if number % 2 else "",
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


def _textvqa(placed: Placed, number: int) -> list[Document]:
    question, scene = placed.question, placed.scene
    return [
        {
            "image_id": image_id(placed),
            "question_id": number,
            "question": question.text,
            "question_tokens": question.text.lower().rstrip("?").split(),
            "image": render(scene),
            "image_width": SIZE,
            "image_height": SIZE,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [question.answer] * 10,
            "image_classes": sorted({thing.shape for thing in scene.shapes}),
            "set_name": "train" if scene.split == "train" else "val",
            "ocr_tokens": [digit.value for digit in scene.digits],
        }
    ]


def _pope(placed: Placed, number: int) -> list[Document]:
    return [
        {
            "id": str(number),
            "question_id": str(number),
            "question": placed.question.text,
            "answer": placed.question.answer,
            "image_source": image_id(placed),
            "image": render(placed.scene),
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


def _mme(placed: Placed, number: int) -> list[Document]:
    category = _MME_CATEGORIES[placed.question.kind]
    return [
        {
            "question_id": f"{category}/{number // 2:04d}.png",
            "image": render(placed.scene),
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


def _mmbench(placed: Placed, number: int) -> list[Document]:
    # MMBench's CircularEval: a question counts only if all rotations of its options are answered
    # correctly, which a preference for one letter cannot achieve.
    question = placed.question
    choices = place(question.answer, question.answers, number, _draw(placed, number))
    category, ability = _MMBENCH_CATEGORIES[question.kind]
    rows = []
    for turn in range(len(choices)):
        turned = choices[turn:] + choices[:turn]
        rows.append(
            {
                "index": turn * ROTATION + number,
                "question": question.text,
                "hint": _HINT if number % 2 else "nan",
                "answer": LETTERS[turned.index(question.answer)],
                **dict(zip(LETTERS, turned, strict=False)),
                "category": category,
                "image": render(placed.scene),
                "source": "scenes",
                "L2-category": ability,
                "comment": "nan",
                "split": "dev" if placed.scene.split == "test" else "train",
            }
        )
    return rows


def _draw(placed: Placed, number: int) -> random.Random:
    # Seeded per question, so that its options do not depend on the rows before it.
    return random.Random(f"choices {image_id(placed)} {number}")


TASKS = {
    "gqa": Task(
        {"color": 4, "shape": 4, "size": 6, "row": 3, "column": 3, "sideways": 1, "upright": 1},
        _gqa,
    ),
    "vqav2": Task({"random": 3, "count_shape": 4, "count_color": 3, "color": 4}, _vqav2),
    "scienceqa_img": Task(
        {"shape": 5, "count_shape": 5, "size": 10, "row": 5, "sideways": 2},
        _scienceqa,
        most_choices=4,
    ),
    "textvqa": Task({"number": 12, "number_at": 5}, _textvqa),
    "pope": Task({"random": 3, "popular": 10, "adversarial": 3}, _pope),
    "mme": Task(
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
    "mmbench_en": Task(
        {"color": 1, "shape": 1, "count_shape": 2, "number": 2}, _mmbench, most_choices=4
    ),
}
