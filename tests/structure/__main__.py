"""`python -m tests.structure [trace]`: how readable the tree is, in figures, against its limits.

Without an argument: sizes, folders, import circles, comments, `Any` and retired names of `bench`
and `methods`; exit code 1 when a limit is passed. `trace` runs a small job and prints how many
files take part in it before the first weight changes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.structure.source_tree import SourceTree

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Figure:
    """One measured figure, its limit, and what passes it."""

    name: str
    value: float
    limit: str
    ok: bool
    offenders: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        mark = "ok  " if self.ok else "FAIL"
        shown = [] if self.ok else [f"       {text}" for text in self.offenders[:12]]
        return [f"{mark} {self.name}: {self.value:g} (limit {self.limit})", *shown]


def figures(tree: SourceTree) -> list[Figure]:
    """Measure a tree against the limits that this project sets itself."""
    modules = list(tree.modules.values())
    longest = sorted(modules, key=lambda module: -module.lines)
    circles = tree.circles()
    crowded = tree.crowded(most=16)
    forwarding = [module.name for module in modules if module.forwards_only]
    comments = 100 * sum(module.comments for module in modules) / tree.lines
    anys = 1000 * sum(module.any_names for module in modules) / tree.lines
    untyped = sorted(modules, key=lambda module: -module.any_names)
    uncommented = sorted(modules, key=lambda module: module.comments * 33 - module.lines)
    retired = tree.retired()
    return [
        # 345 when the layout was drawn; a new method, engine or harness may add a file, if no other
        # can hold it.
        Figure("Python files", len(modules), "at most 405", len(modules) <= 405),
        Figure("median lines of a file", tree.median, "at least 110", tree.median >= 110),
        Figure(
            "lines of the longest file",
            longest[0].lines,
            "at most 450",
            longest[0].lines <= 450,
            tuple(f"{module.name} {module.lines}" for module in longest if module.lines > 450),
        ),
        Figure(
            "folders of more than 16 modules",
            len(crowded),
            "0",
            not crowded,
            tuple(f"{folder} {n}" for folder, n in crowded.items()),
        ),
        Figure(
            "import circles",
            len(circles),
            "0",
            not circles,
            tuple(" <-> ".join(circle) for circle in circles),
        ),
        Figure("forwarding modules", len(forwarding), "0", not forwarding, tuple(forwarding)),
        Figure(
            "comment lines per 100 lines",
            round(comments, 2),
            "at least 3",
            comments >= 3,
            tuple(f"{m.name} {m.comments} in {m.lines}" for m in uncommented),
        ),
        Figure(
            "Any per 1,000 lines",
            round(anys, 2),
            "at most 8",
            anys <= 8,
            tuple(f"{m.name} {m.any_names}" for m in untyped),
        ),
        Figure("names with a retired word", len(retired), "0", not retired, tuple(retired)),
    ]


def main(arguments: list[str]) -> int:
    """Print the figures, or the trace; 1 when a limit is passed."""
    if arguments == ["trace"]:
        from tests.structure.trace import main as trace

        return trace()
    if arguments:
        print(
            f"python -m tests.structure: {arguments[0]}? give nothing, or: trace", file=sys.stderr
        )
        return 2
    measured = figures(SourceTree(ROOT))
    for figure in measured:
        print("\n".join(figure.lines()))
    return 0 if all(figure.ok for figure in measured) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
