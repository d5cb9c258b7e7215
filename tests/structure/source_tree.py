"""Figures of the source tree: sizes, imports, comments, names.

Every figure is derived from the files alone; nothing is imported, so that a broken tree can be
measured as well. Imports inside functions and under `TYPE_CHECKING` count like all others:
two modules whose types need each other are one idea in two files.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGES = ("bench", "methods")

# Names that this project once used for things that the field has a word for, in the form that
# they would have inside an identifier. `anatomy` and `zoo` were folders, the rest classes and
# functions. A word that also has an honest meaning ("cut", "ask") is not listed.
RETIRED = (
    "anatomy", "attendance", "beginnings", "census", "contestant", "dissect", "fitness", "ghost",
    "grove", "lending", "lent", "loan", "passage", "pristine", "renewed", "roomy", "sight",
    "spread_scorer", "trunk", "turns_in_three", "undissected", "zoo",
)  # fmt: skip
PRAGMA = re.compile(r"#\s*(type:|noqa|fmt:|pragma|mypy:|ruff:)")


@dataclass(frozen=True)
class Module:
    """One Python file: its dotted name, its text and its syntax tree."""

    name: str
    path: Path
    text: str
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> int:
        return self.text.count("\n")

    @cached_property
    def comments(self) -> int:
        """Lines that carry a comment for a reader; marks for tools are none."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        found = {
            t.start[0] for t in tokens if t.type == tokenize.COMMENT and not PRAGMA.match(t.string)
        }
        return len(found)

    @cached_property
    def any_names(self) -> int:
        return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(self.tree))

    @cached_property
    def forwards_only(self) -> bool:
        """Whether a module that is no package holds imports and nothing else."""
        body = [n for n in self.tree.body if not _is_docstring(n) and not _is_future(n)]
        return not self.is_package and bool(body) and all(map(_is_import, body))

    def names(self) -> Iterator[str]:
        """Yield every name that this file gives to something."""
        yield self.name.rpartition(".")[2]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name
            elif isinstance(node, ast.arg):
                yield node.arg
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_import(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    return isinstance(node, ast.Import | ast.ImportFrom)


@dataclass
class SourceTree:
    """All Python files of some packages below one folder."""

    root: Path
    packages: tuple[str, ...] = PACKAGES
    modules: dict[str, Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = {}
        for package in self.packages:
            for path in sorted((self.root / package).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                self.modules[name] = Module(name, path, path.read_text(), is_package)

    def imports(self, module: Module) -> set[str]:
        """Return the modules of the tree that a module imports, at any depth of its code."""
        found = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                found |= {self._known(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {
                    self._known(f"{node.module}.{alias.name}") or self._known(node.module)
                    for alias in node.names
                }
        return {name for name in found if name and name != module.name}

    def _known(self, name: str) -> str:
        return name if name in self.modules else ""

    def circles(self) -> list[list[str]]:
        """Return the groups of modules that import each other (strongly connected components)."""
        graph = {name: sorted(self.imports(module)) for name, module in self.modules.items()}
        return [sorted(group) for group in _components(graph) if len(group) > 1]

    def crowded(self, most: int) -> dict[str, int]:
        """Return the folders with more than `most` modules."""
        counts: dict[str, int] = {}
        for module in self.modules.values():
            folder = str(module.path.parent.relative_to(self.root))
            counts[folder] = counts.get(folder, 0) + 1
        return {folder: n for folder, n in sorted(counts.items()) if n > most}

    def retired(self) -> list[str]:
        """Return `module: name` for every name that holds a retired word."""
        found = []
        for module in self.modules.values():
            for name in sorted(set(module.names())):
                words = set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))
                if any(word in words or ("_" in word and word in name) for word in RETIRED):
                    found.append(f"{module.name}: {name}")
        return found

    @property
    def lines(self) -> int:
        return sum(module.lines for module in self.modules.values())

    @property
    def median(self) -> float:
        return statistics.median(module.lines for module in self.modules.values())


def _components(graph: dict[str, list[str]]) -> list[list[str]]:
    """Return Tarjan's strongly connected components, without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for start, first in graph.items():
        if start in index:
            continue
        work = [(start, iter(first))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, successors = work[-1]
            for after in successors:
                if after not in index:
                    index[after] = low[after] = len(index)
                    stack.append(after)
                    on_stack.add(after)
                    work.append((after, iter(graph[after])))
                    break
                if after in on_stack:
                    low[node] = min(low[node], index[after])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    found.append(stack[cut:])
                    on_stack -= set(stack[cut:])
                    del stack[cut:]
    return found
