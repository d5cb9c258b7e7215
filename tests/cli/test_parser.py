"""The parser names a handler for every command, and imports none."""

import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.cli.arguments import results_dir_as_override
from bench.cli.main import main
from bench.cli.parser import COMMANDS, RAW_COMMANDS, build_parser
from bench.errors import UserError

ARGUMENTS = {
    "run": [], "table": ["camera_main"], "compare": ["a", "b"], "plot": ["front"], "ls": ["runs"],
    "show": ["a"], "verify": ["a"], "rescore": ["a"], "resume": ["latest"],
    "export": ["a", "folder"], "carve": ["folder"], "convert": ["a", "folder", "--tower", "clip"],
}  # fmt: skip
HEAVY = ("torch", "pandas", "pydantic", "hydra", "omegaconf", "rich", "bench.cli.commands")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_handler(command):
    parsed = build_parser().parse_args([command, *ARGUMENTS.get(command, [])])
    assert callable(pkgutil.resolve_name(parsed.handler))
    if command in RAW_COMMANDS:
        assert parsed.handler == RAW_COMMANDS[command]


@pytest.mark.parametrize(
    "words", [["--results-dir", "x/y"], ["--results-dir=x/y"], ["results_dir=x/y"]]
)
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"doctor", "convert", "trust"}))
def test_a_results_folder_is_named_alike_for_every_command(command, words, monkeypatch):
    given = [command, *ARGUMENTS.get(command, []), *words]
    if command in RAW_COMMANDS:
        seen = []
        monkeypatch.setattr(pkgutil, "resolve_name", lambda _: lambda rest: seen.extend(rest) or 0)
        assert main(given) == 0
        assert seen == [*ARGUMENTS[command], "results_dir=x/y"]
        return
    parsed = build_parser().parse_args(given)
    if "results_dir" in parsed:
        assert parsed.results_dir == Path("x/y")
    else:
        assert parsed.overrides == ["results_dir=x/y"]


@pytest.mark.parametrize(("words", "missing"), [
    (["export", "a"], "DIR"), (["rescore"], "RUN"), (["resume"], "SWEEP"), (["plot"], "KIND"),
])  # fmt: skip
def test_what_may_be_left_out_is_not_called_required(words, missing):
    with pytest.raises(UserError, match=rf"arguments are required: {missing}$"):
        build_parser().parse_args(words)


def test_a_flag_without_its_folder_is_refused_and_others_stay():
    words = ["a=b", "--results-dir"]
    assert results_dir_as_override(words) == ["a=b", "results_dir="]
    assert results_dir_as_override(["-m", "method=dense,gptq"]) == ["-m", "method=dense,gptq"]
    with pytest.raises(UserError, match="expected one argument"):
        build_parser().parse_args(["gc", "--results-dir"])


def test_a_folder_given_twice_is_refused_instead_of_choosing_one():
    with pytest.raises(UserError, match=r"^--results-dir is given twice: give it once$"):
        results_dir_as_override(["--results-dir", "x", "a=b", "--results-dir=y"])


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slimbench {version('slimbench')}\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_its_standard_streams_a_command_has_the_same_exit_code(closed):
    code = (
        "from bench.cli.main import main; import os, sys; code = main(sys.argv[1:]); "
        "os._exit(code + 10 * (os.open('/', os.O_RDONLY) < 3))"
    )
    for words, expected in ((["--version"], 0), (["runn"], 2)):
        shell = ["sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", code, *words]
        assert subprocess.run(shell, capture_output=True, check=False).returncode == expected


@pytest.mark.parametrize("code", ["import bench", "from bench.cli.main import main; main(['-h'])"])
def test_start_up_imports_nothing_heavy(code):
    check = f"{code}\nimport sys\nprint('heavy:', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_what_looks_up_and_reports_does_without_torch():
    """Seconds of every command that loads no network."""
    light = (
        "bench.config.sweep_checks, bench.evaluation, bench.models.source, bench.records, "
        "bench.reporting.html, bench.runner.execute, bench.runner.inputs, bench.sweeps.plan"
    )
    heavy = ("torch", "transformers", "lm_eval", "datasets", "pandas")
    code = f"import sys, {light}\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_command_leaves_no_collection_to_whoever_comes_after():
    """When a command ends, no collection looks at its objects, and none does when Python ends."""
    code = (
        "import atexit, gc; from bench.cli.main import main; "
        # Handlers run last in, first out, so this one sees what the command's own has done.
        "atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "main(['ls', 'models']); main(['--version']); "
        "print(gc.get_freeze_count() == 0, gc.get_count()[0] < gc.get_threshold()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["True True", "True"]
