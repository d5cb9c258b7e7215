"""Question sets of the scene tasks, by task and split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from PIL import Image

from bench.data.synthetic import Split
from bench.data.synthetic.scenes import tasks
from bench.data.synthetic.scenes.scene import draw_scene
from bench.data.synthetic.scenes.tasks import SceneDocument, image_id
from bench.errors import UserError

TASKS = tuple(tasks.SCENE_TASKS)

# Each task searches its own range of scene indices, so that no two tasks share an image.
_SCENES_PER_TASK = 100_000


def documents(task: str, split: Split = "test") -> list[SceneDocument]:
    """Return the rows of one split of a task in the schema of its data set, with PIL images.

    Raises:
        UserError: no task has this name.
    """
    # Not cached: lmms-eval writes into the rows that it scores, so every call needs new ones.
    return _task_named(task).documents(split, _first_scene(task))


def scene_images(task: str, split: Split = "test") -> list[SceneDocument]:
    """Return GQA's second data set: rows of `id` and `image`, referred to by `imageId`.

    Raises:
        UserError: the task is not gqa; the rows of all other tasks contain their images.
    """
    if task != "gqa":
        raise UserError(f"{task} has no separate data set of images, only gqa has")
    scenes = {
        image_id(each): each.scene for each in _task_named(task).placed(split, _first_scene(task))
    }
    return [{"id": name, "image": draw_scene(scene)} for name, scene in scenes.items()]


def chance_accuracy(task: str) -> float:
    """Return the best accuracy without the image: 1 / number of answers, averaged over questions.

    For `mmbench_en` it assumes a model that sticks to its choice when the options are rotated.
    """
    return _task_named(task).chance(_task_named(task).placed("test", _first_scene(task)))


def fingerprint(task: str) -> str:
    """Return the SHA-256 of a task's test rows with their pixels."""
    return rows_fingerprint(documents(task) + (scene_images(task) if task == "gqa" else []))


def rows_fingerprint(rows: Iterable[SceneDocument]) -> str:
    """Return the SHA-256 of rows with their pixels: a task's own, then those of its images."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_pixel_hash).encode())
    return digest.hexdigest()


def _pixel_hash(value: object) -> str:
    # Pixels and not an encoded file, whose bytes depend on the version of the image library.
    if not isinstance(value, Image.Image):
        raise TypeError(f"{type(value).__name__} in a row")
    return hashlib.sha256(f"{value.mode}{value.size}".encode() + value.tobytes()).hexdigest()


def _task_named(task: str) -> tasks.SceneTask:
    if task not in tasks.SCENE_TASKS:
        raise UserError(f"task {task} is none of the scene tasks: {', '.join(TASKS)}")
    return tasks.SCENE_TASKS[task]


def _first_scene(task: str) -> int:
    return _SCENES_PER_TASK * TASKS.index(task)
