"""Accuracy of micro_llava: greedy answers to the prompts of the seven tasks, exact match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bench.data.synthetic import Split
from bench.data.synthetic.scenes import question_sets, scene, tasks

_BATCH = 64
_LONGEST_ANSWER = 4

# A plain image, so that what remains is what the question text alone predicts.
_GREY = (52, 52, 52)


@torch.no_grad()
def greedy_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image_prompts: Sequence[tuple[Image.Image, str]],
) -> list[str]:
    """Answer each prompt about its image, greedily."""
    answers: list[str] = []
    for start in range(0, len(image_prompts), _BATCH):
        images, prompts = zip(*image_prompts[start : start + _BATCH], strict=True)
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts
        ]
        texts = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=list(images), text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
        # Prompts are padded on the left, so all answers start at the same column.
        answer_ids = output[:, inputs["input_ids"].shape[1] :]
        answers += [
            text.strip() for text in processor.batch_decode(answer_ids, skip_special_tokens=True)
        ]
    return answers


def task_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: str,
    documents: Sequence[tasks.SceneDocument],
    *,
    blank: bool = False,
) -> float:
    """Return the fraction of correct answers; `blank` replaces all images by a grey one.

    A question of MMBench counts as correct when it is answered correctly in all rotations of its
    options.
    """
    rendered = [tasks.render_task_prompt(task, document) for document in documents]
    images = [_blank()] * len(documents) if blank else _images(task, documents)
    prompts = [prompt for prompt, _ in rendered]
    answers = greedy_answers(model, processor, list(zip(images, prompts, strict=True)))
    right = [text == gold for text, (_, gold) in zip(answers, rendered, strict=True)]
    questions: dict[int, bool] = {}
    for number, (document, hit) in enumerate(zip(documents, right, strict=True)):
        # MMBench's circular evaluation: the rotations of one question share their index modulo
        # ROTATION.
        question = document["index"] % tasks.ROTATION_OFFSET if task == "mmbench_en" else number
        questions[question] = questions.get(question, True) and hit
    return sum(questions.values()) / len(questions)


def _images(task: str, documents: Sequence[tasks.SceneDocument]) -> list[Image.Image]:
    """Return the documents' images; GQA keeps them in a separate data set."""
    if task != "gqa":
        return [document["image"] for document in documents]
    split: Split = "test" if documents[0]["imageId"].startswith("test") else "train"
    by_id = {row["id"]: row["image"] for row in question_sets.scene_images(task, split)}
    return [by_id[document["imageId"]] for document in documents]


def _blank() -> Image.Image:
    return Image.new("RGB", (scene.IMAGE_SIZE, scene.IMAGE_SIZE), _GREY)
