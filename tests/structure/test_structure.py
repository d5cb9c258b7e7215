"""The figures of the tree: right on trees made by hand, and within their limits on this one."""

from pathlib import Path

import pytest

from tests.structure import trace
from tests.structure.__main__ import ROOT, figures
from tests.structure.source_tree import SourceTree


def tree(folder: Path, **files: str) -> SourceTree:
    for name, text in files.items():
        path = folder / "bench" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceTree(folder, ("bench",))


def test_a_circle_is_found_through_functions_and_type_checking(tmp_path):
    made = tree(
        tmp_path,
        a="def f():\n    from bench import b\n",
        b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bench.c import x\n",
        c="import bench.a\nx = 1\n",
        d="from bench.c import x\n",
    )
    assert made.circles() == [["bench.a", "bench.b", "bench.c"]]


def test_comments_are_counted_by_line_and_pragmas_are_none(tmp_path):
    made = tree(tmp_path, a="x = 1  # why\n# more\ny = 2  # noqa: E501\ns = '# no comment'\n")
    assert made.modules["bench.a"].comments == 2


def test_a_module_of_imports_alone_forwards(tmp_path):
    made = tree(
        tmp_path,
        a='"""D."""\nfrom __future__ import annotations\nfrom os import path\n__all__ = ["path"]\n',
        b="from os import path\nx = path\n",
    )
    assert made.modules["bench.a"].forwards_only
    assert not made.modules["bench.b"].forwards_only


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class LentLayer: pass\n", ["bench.a: LentLayer"]),
        ("def of(pristine): pass\n", ["bench.a: pristine"]),
        ("talent = silent = 1\n", []),
        ("GHOST = 1\n", ["bench.a: GHOST"]),
    ],
)
def test_a_retired_word_is_found_as_a_word(tmp_path, text, found):
    assert tree(tmp_path, a=text).retired() == found


def test_folders_with_too_many_modules_are_named(tmp_path):
    made = tree(tmp_path, **{f"full__m{i}": "" for i in range(4)}, **{"few__m": ""})
    assert made.crowded(most=3) == {"bench/full": 4}


@pytest.mark.broad
def test_this_tree_is_within_its_limits():
    found = figures(SourceTree(ROOT))
    assert all(figure.ok for figure in found), "\n".join(
        line for figure in found for line in figure.lines() if not figure.ok
    )


@pytest.mark.broad
def test_the_way_to_the_first_changed_weight_is_short():
    assert trace.main() == 0
