"""Question sets of the scene tasks, by task and split."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from PIL import Image

from bench.data.scenes import tasks
from bench.data.scenes.prompts import Document
from bench.data.scenes.render import render
from bench.data.scenes.scene import Split
from bench.data.scenes.tasks import image_id
from bench.errors import UserError

TASKS = tuple(tasks.TASKS)
# Each task searches its own range of scene indices, so that no two tasks share an image.
_RANGE = 100_000


def documents(task: str, split: Split = "test") -> list[Document]:
    """Return the rows of one split of a task in the schema of its data set, with PIL images.

    Raises:
        UserError: no task has this name.
    """
    # Not cached: lmms-eval writes into the rows that it scores, so every call needs new ones.
    return _task(task).documents(split, _start(task))


def images(task: str, split: Split = "test") -> list[Document]:
    """Return GQA's second data set: rows of `id` and `image`, referred to by `imageId`.

    Raises:
        UserError: the task is not gqa; the rows of all other tasks contain their images.
    """
    if task != "gqa":
        raise UserError(f"{task} has no separate data set of images, only gqa has")
    scenes = {image_id(each): each.scene for each in _task(task).placed(split, _start(task))}
    return [{"id": name, "image": render(scene)} for name, scene in scenes.items()]


def chance(task: str) -> float:
    """Return the best accuracy without the image: 1 / number of answers, averaged over questions.

    For `mmbench_en` it assumes a model that sticks to its choice when the options are rotated.
    """
    return _task(task).chance(_task(task).placed("test", _start(task)))


@functools.cache
def fingerprint(task: str) -> str:
    """Return the SHA-256 of a task's test rows with their pixels."""
    digest = hashlib.sha256()
    rows = documents(task) + (images(task) if task == "gqa" else [])
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_pixels).encode())
    return digest.hexdigest()


def _pixels(value: Any) -> str:
    # Pixels and not an encoded file, whose bytes depend on the version of the image library.
    if not isinstance(value, Image.Image):
        raise TypeError(f"{type(value).__name__} in a row")
    return hashlib.sha256(f"{value.mode}{value.size}".encode() + value.tobytes()).hexdigest()


def _task(task: str) -> tasks.Task:
    if task not in tasks.TASKS:
        raise UserError(f"task {task} is none of the scene tasks: {', '.join(TASKS)}")
    return tasks.TASKS[task]


def _start(task: str) -> int:
    return _RANGE * TASKS.index(task)
