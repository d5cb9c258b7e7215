"""`python -m tests.performance [NAME ...] [--json]`: measure speed and memory against the goals.

Each NAME is a module of this folder with a function `figures()`; without a name all are measured.
A module may choose how many threads it measures with; the next one finds them as they were.
`NAME:PART,...` measures some parts of a module that takes long.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
NOT_FIGURES = {"__main__", "figure", "interleaved", "random_models", "timed_tasks"}


def names() -> list[str]:
    """Return every module that measures something."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in NOT_FIGURES)


def main() -> int:
    """Measure what was asked; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.performance", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME[:PART,...]")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures, threads = [], torch.get_num_threads()
    for asked in given.names or names():
        name, _, parts = asked.partition(":")
        if name not in names():
            parser.error(f"{name}: choose from {', '.join(names())}")
        module = importlib.import_module(f"tests.performance.{name}")
        for figure in module.figures(*filter(None, parts.split(","))):
            figures.append(figure)
            if not given.json:
                print(figure.line(), flush=True)
        torch.set_num_threads(threads)
    if given.json:
        print(json.dumps([dataclasses.asdict(figure) for figure in figures], indent=1))
    return 0 if all(figure.ok for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
