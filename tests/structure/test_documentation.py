"""The site: every public name has a reference, and every command of a tutorial runs.

The site itself is built by `make docs`, strictly; mkdocs is not among the tests' packages.
"""

import ast
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import bench
import bench.method
import bench.records
from bench.cli.main import main
from bench.cli.parser import COMMANDS
from bench.config.overrides import Overrides
from bench.config.sweep_checks import alternative_configs
from bench.estimation.run_estimate import SweepEstimate
from bench.reporting.comparison import Comparison
from bench.runner.launch import Runs
from bench.schema import BenchmarkConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
FEW = ["benchmark.limit=2", "calibration.rows=2", "costs.length=32", "threads=1", "tracker=none"]


@pytest.fixture(scope="module")
def reference():
    """The module of the generated pages."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "site" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, language):
    """The code blocks of a page, with the file that each is called in its title."""
    fence = rf"^```{language}(?: title=\"(.*?)\")?\n(.*?)^```"
    return re.findall(fence, page.read_text(), re.M | re.S)


def commands(page):
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def public_objects():
    """What `bench` and `bench.records` export, what a method is made of, what functions return."""
    for module in (bench, bench.records):
        yield from (getattr(module, name) for name in module.__all__ if name != "records")
    for name, member in vars(bench.method).items():
        if isinstance(member, type) and member.__module__ == "bench.method" and name[0] != "_":
            yield member
    yield from (Runs, SweepEstimate, Comparison)


def test_every_public_name_has_a_reference(reference):
    pages = "\n".join(reference.pages().values())
    parts = [name.rpartition(".") for name in re.findall(r"^::: ([\w.]+)$", pages, re.M)]
    objects = {getattr(importlib.import_module(module), member) for module, _, member in parts}
    assert set(public_objects()) <= objects


def test_the_reference_has_every_command_key_and_config(reference):
    pages = reference.pages()
    lines = pages["reference/commands.md"].splitlines()
    assert {f"## bench {name}" for name in COMMANDS} <= set(lines)
    for key in BenchmarkConfig.model_fields:
        assert f"`benchmark.{key}`" in pages["reference/config.md"]
    shipped = pages["reference/shipped.md"]
    for group in ("method", "model", "benchmark", "table"):
        for file in (ROOT / "conf" / group).glob("[!_]*.yaml"):
            assert f"| `{file.stem}` |" in shipped


@pytest.mark.sample(3)
@pytest.mark.parametrize("page", [DOCS / "start.md", *TUTORIALS], ids=lambda page: page.stem)
def test_every_run_of_a_tutorial_composes(page, tmp_path, monkeypatch):
    written_out(page, tmp_path, monkeypatch)
    for words in commands(page):
        assert words[0] in ("bench", "make", "git", "source", "pip"), words
        if words[:2] == ["bench", "run"] and "model=./out/camera_p" not in words:
            assert alternative_configs(Overrides.parse(words[2:]))
        elif words[0] == "bench":
            assert words[1] in COMMANDS


def written_out(page, folder, monkeypatch):
    """Write the files of a page into a folder, agree to its project, and enter it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for language in ("toml", "yaml", "python", "json"):
        for title, text in blocks(page, language):
            if title:
                file = folder / title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    monkeypatch.chdir(folder)
    if (folder / "slimbench.toml").exists():
        assert main(["trust", "--yes"]) == 0


# The commands of a page, in order, with few questions; those for a cluster or a GPU are composed.
def test_the_method_of_contributing_is_the_example():
    code = (ROOT / "examples" / "plugin" / "weakest_plugin" / "zeroing.py").read_text()
    shown = (ROOT / "CONTRIBUTING.md").read_text().partition("   ```python\n")[2]
    assert textwrap.dedent(shown.partition("   ```\n")[0]) == code


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_commands_of_a_tutorial_run(page, tmp_path, monkeypatch):
    written_out(page, tmp_path, monkeypatch)
    for words in commands(page):
        if words[0] != "bench" or any("slurm" in w or "ray" in w or "qwen" in w for w in words):
            continue
        if words[1] == "table" and "scale=micro" not in words:
            continue
        kept = [word for word in words[1:] if not word.startswith("benchmark.limit=")]
        assert main(kept + FEW if words[1] in ("run", "table") else kept) == 0, words


@pytest.mark.slow
def test_the_lines_of_the_notebook_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = bench.run
    monkeypatch.setattr(bench, "run", lambda *words, **given: run(*words or (FEW,), **given))
    names = {}
    for _, block in blocks(DOCS / "tutorials" / "6_notebook.md", "python"):
        exec(block, names)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    names, shown = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]).replace("limit=50", "limit=4"))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else value)
    assert len(shown) == 6
    assert "camera_p 0.4" in shown[0]
    assert "arc_easy" in shown[2]
