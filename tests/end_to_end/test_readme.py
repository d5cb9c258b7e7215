"""The README's commands, keys, files and Python lines work as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

import bench as library
from bench.cli.main import main
from bench.cli.parser import COMMANDS
from bench.config.overrides import Overrides
from bench.config.sweep_checks import alternative_configs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FEW = ["benchmark.limit=2", "calibration.rows=2", "costs.length=32", "threads=1"]


def blocks(language):
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """The words of every command in the README, without comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_there_are_commands():
    assert len(commands()) >= 8
    assert {words[0] for words in commands()} <= {"bench", "make", "pip", "git", "cd"}


RUNS = [words[2:] for words in commands() if words[:2] == ["bench", "run"]]


# Composed and validated, not run: some need a GPU, a hub or a folder of the reader's.
@pytest.mark.sample(3)
@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_every_run_composes(overrides):
    assert alternative_configs(Overrides.parse(overrides))


OFFLINE = [words for words in RUNS if "model=micro_moe" in words]


@pytest.mark.parametrize("overrides", OFFLINE[:1], ids=" ".join)
def test_the_first_run_on_a_shipped_model_runs(overrides, tmp_path):
    given = [*overrides, *FEW, "benchmark.tasks=[arc_easy]", "~benchmark.perplexity"]
    assert main(["run", *given, "tracker=none", f"results_dir={tmp_path}"]) == 0


def test_every_command_exists():
    assert {words[1] for words in commands() if words[0] == "bench"} <= set(COMMANDS)


def test_the_table_of_commands_is_complete():
    table = README.partition("## Commands")[2].partition("\n## ")[0]
    first_cells = " ".join(re.findall(r"^\| (`bench .*?) \|", table, re.MULTILINE))
    named = set(re.findall(r"`(?:bench )?([a-z]+)", first_cells))
    assert named == set(COMMANDS)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_every_link_into_the_tree_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_python_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = library.run
    fast = [*FEW, "benchmark.tasks=[arc_easy]", "~benchmark.perplexity"]
    monkeypatch.setattr(library, "run", lambda **given: run(fast, **given))
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert len(names["frame"]) and names["comparison"].contrasts
