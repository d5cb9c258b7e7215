"""`python -m tests.performance [NAME ...] [--json]`: measure speed and memory against the goals.

Each NAME is a module of this folder with a function `figures()`; without a name all are measured.
A module whose `figures` takes a part measures that alone when it is asked for as NAME:PART.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_FIGURES = {"__main__", "exams", "figure", "interleaved", "random_models"}


def names() -> list[str]:
    """Return every module that measures something."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in NOT_FIGURES)


def main() -> int:
    """Measure what was asked; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.performance", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for name in given.names:
        if name.partition(":")[0] not in names():
            parser.error(f"{name}: there is {', '.join(names())}")
    figures = []
    for name in given.names or names():
        module, _, part = name.partition(":")
        measure = importlib.import_module(f"tests.performance.{module}").figures
        for figure in measure(part) if part else measure():
            figures.append(figure)
            if not given.json:
                print(figure.line(), flush=True)
    if not figures:
        parser.error(f"{' '.join(given.names)}: no such part")
    if given.json:
        print(json.dumps([dataclasses.asdict(figure) for figure in figures], indent=1))
    return 0 if all(figure.ok for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
