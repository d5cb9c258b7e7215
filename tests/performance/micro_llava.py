"""How far the small vision-language model is from what its tables need.

Read from the log of its training, which the slow tests of
tests/models/embedded/test_micro_llava.py repeat: every task's accuracy is to be at least 80 %, and
at least 30 points above chance.
"""

from __future__ import annotations

import json

from bench.data.synthetic.scenes import question_sets
from bench.models.embedded.micro_llava import FOLDER
from tests.performance.figure import Figure

ENOUGH, ABOVE = 0.8, 0.3


def figures() -> list[Figure]:
    """Accuracy of each task beside chance and beside a blank image."""
    results = json.loads((FOLDER / "training.json").read_text())["results"]
    return [_figure(task, results) for task in question_sets.TASKS]


def _figure(task: str, results: dict[str, dict[str, float]]) -> Figure:
    seen, blind, chance = (results[key][task] for key in ("accuracy", "blank_image", "chance"))
    good = seen >= ENOUGH and seen >= chance + ABOVE
    how = f"chance {chance:.3f}, with a blank image {blind:.3f}"
    return Figure(f"micro_llava on {task}", seen, f">= {ENOUGH}", good, how)
