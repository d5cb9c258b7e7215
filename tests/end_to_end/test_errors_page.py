"""The page of exit codes and messages is what the program does."""

import inspect
import os
import re
import shlex
from pathlib import Path
from threading import Event

import pytest

from bench import errors
from bench.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()


def rows(heading):
    """Return the cells of the table under a heading, without its first two lines."""
    part = PAGE.split(heading)[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_exit_code_has_its_row():
    named = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    told = {cells[1].strip("`"): int(cells[0]) for cells in rows("# Exit codes")}
    assert told == named


def test_every_class_has_its_row():
    classes = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, BaseException)
        if kind.__module__ == errors.__name__
    }
    told = {cells[0].strip("`") for cells in rows("## Classes")} - {"any other exception"}
    assert told == classes


@pytest.mark.sample(10)
@pytest.mark.parametrize(("command", "message"), rows("## Frequent mistakes"))
def test_a_frequent_mistake_is_answered_as_told(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command.strip("`"))
    assert program == "bench"
    assert main(arguments) == errors.EXIT_WRONG_INPUT
    said = capsys.readouterr()
    assert message.strip("`") in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def raises(error):
    def command(given):
        raise error

    return command


@pytest.mark.parametrize(("error", "code", "said"), [
    (errors.UserError("a=1: wrong"), 2, "bench: a=1: wrong"),
    (errors.MissingData("nothing here"), 2, "bench: nothing here"),
    (errors.RunsFailed(["one", "two"]), 1, "bench: failed: one\nbench: failed: two"),
    (errors.LibraryFailure("it ended the program"), 1, "bench: failed: LibraryFailure: it ended"),
    (errors.Stopped("the disk is full"), 75, "bench: the disk is full"),
    (OSError(28, "No space left on device", "x"), 75, "run the same command to resume"),
    (KeyboardInterrupt(), 75, "bench: interrupted; run the same command to resume"),
    # Of a worker or a server, while the output is read.
    (BrokenPipeError(32, "Broken pipe"), 1, "bench: failed: BrokenPipeError: [Errno 32] Broken"),
    (RecursionError("too deep"), 1, "bench: failed: RecursionError: too deep (details: "),
    (MemoryError(), 1, "a lower benchmark.batch_size"),
    (SystemExit("video path does not exist"), 1, "ended the program: video path does not exist"),
    (SystemExit(1), 1, "ended the program: exit code 1"),
    (SystemExit(0), 0, ""),
    (
        type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("no match"),
        1, "bench: failed: PanicException: no match",
    ),
])  # fmt: skip
def test_whatever_a_command_raises_ends_in_a_sentence(
    monkeypatch, tmp_path, capsys, error, code, said
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("bench.cli.commands.records.show", raises(error))
    assert main(["show", "a", "--results-dir", str(tmp_path)]) == code
    heard = capsys.readouterr().err
    assert said in heard
    assert "Traceback" not in heard
    if code:
        assert re.match("bench: ", heard)


@pytest.mark.parametrize("listed", [["methods"], ["methods", "--json"], ["tables", "--json"]])
def test_a_reader_that_has_gone_is_told_nothing(monkeypatch, capsys, listed):
    """rich would exit the program, a long text fail at once, and a short one when Python exits."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["ls", *listed]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_does_not_fit_on_the_disk_is_missed(monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["ls", "tables", "--json"]) == 75
    assert "No space left on device" in capsys.readouterr().err


def test_without_a_folder_for_the_details_they_are_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr("bench.cli.commands.records.show", raises(ValueError("odd")))
    assert main(["show", "a", "--results-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("bench: failed: ValueError: odd\n")


def test_a_library_that_ends_the_program_is_an_error_inside_a_run():
    with (
        pytest.raises(errors.LibraryFailure, match=r"^task a ended the program: exit code 3$"),
        errors.library_failures_as_errors("task a"),
    ):
        raise SystemExit(3)
    with pytest.raises(KeyboardInterrupt), errors.library_failures_as_errors("task a"):
        raise KeyboardInterrupt


def test_a_job_queue_ends_the_program_inside_a_run_to_run_the_job_again(monkeypatch):
    monkeypatch.setattr(errors, "REQUEUED", Event())
    errors.REQUEUED.set()
    with pytest.raises(SystemExit), errors.library_failures_as_errors("task a"):
        raise SystemExit(144)
