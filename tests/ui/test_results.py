"""Results on stdout: foreign text verbatim, without control characters, and not folded."""

import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from bench import ui


def test_square_brackets_are_printed(capsys):
    ui.console().print("bench run 'benchmark.tasks=[arc_easy]' [/x] :smile:")
    assert capsys.readouterr().out == "bench run 'benchmark.tasks=[arc_easy]' [/x] :smile:\n"


@pytest.mark.parametrize("kind", [str, Text])
def test_control_characters_are_removed_wherever_they_stand(capsys, kind):
    table = Table(title="ti\x1b[2Jtle")
    table.add_column("he\x1bad")
    table.add_row(kind("ce\x1b[31mll\x07"))
    ui.console().print(table)
    ui.console().print(kind("li\x9bne"))
    ui.console().rule("ru\x1ble")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\x9b" not in out
    for part in ("ti[2Jtle", "head", "ce[31mll", "line", "rule"):
        assert part in out


def test_rows_are_a_table_or_json(capsys):
    rows = [{"run": "[a]", "value": 0.123456, "none": None}]
    assert ui.print_rows(rows, as_json=False) == 0
    out = capsys.readouterr().out
    assert "[a]" in out and "0.1235" in out and " - " in out
    ui.print_rows(rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    ui.print_rows([], as_json=False)
    assert capsys.readouterr().out == "nothing to list\n"


def test_json_takes_paths_and_hides_nothing(capsys):
    ui.print_json({"path": Path("a/b"), "text": "\x1b"})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert json.loads(out) == {"path": "a/b", "text": "\x1b"}


def test_a_line_is_not_folded(capsys):
    ui.print_text("x" * 500 + "\x1b")
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_counts_have_a_prefix():
    assert ui.format_quantity(2.14e6) == "2.14 M"
    assert ui.format_quantity(12) == "12"
    assert ui.format_quantity(None) == "-"


def test_what_is_short_is_not_folded_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    ui.draw_rows([{"sweep": "20261130-011512-261932", "done": 2, "words": "a long text " * 20}])
    out = capsys.readouterr().out
    assert "20261130-011512-261932" in out
    assert max(map(len, out.splitlines())) <= 60
