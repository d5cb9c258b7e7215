"""The question sets of the scenes, by task and split."""

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
# Tasks search for scenes in ranges of their own.
_RANGE = 100_000


def documents(task: str, split: Split = "test") -> list[Document]:
    """Return the rows of one side of a task in the schema of its data set, images as PIL's.

    Every call returns new rows: lmms-eval writes into those it scores.

    Raises:
        UserError: there is no such task.
    """
    return _task(task).documents(split, _start(task))


def images(task: str, split: Split = "test") -> list[Document]:
    """Return the rows `id`, `image` that a task's `imageId` refers to: GQA keeps images apart.

    Raises:
        UserError: the task's rows hold their images themselves.
    """
    if task != "gqa":
        raise UserError(f"{task} has no second data set of images, only gqa has")
    scenes = {image_id(each): each.scene for each in _task(task).placed(split, _start(task))}
    return [{"id": name, "image": render(scene)} for name, scene in scenes.items()]


def chance(task: str) -> float:
    """Return the accuracy that is reached without the image.

    A question's text tells nothing about its answer, so this is one over the number of answers,
    averaged over questions. For `mmbench_en` it is that of one who, having chosen an option, keeps
    to it when the options are turned round.
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
    """Return the hash of an image's mode, size and pixels, for JSON."""
    if not isinstance(value, Image.Image):
        raise TypeError(f"{type(value).__name__} in a row")
    return hashlib.sha256(f"{value.mode}{value.size}".encode() + value.tobytes()).hexdigest()


def _task(task: str) -> tasks.Task:
    if task not in tasks.TASKS:
        raise UserError(f"task {task} is none of the scenes': {', '.join(TASKS)}")
    return tasks.TASKS[task]


def _start(task: str) -> int:
    return _RANGE * TASKS.index(task)
