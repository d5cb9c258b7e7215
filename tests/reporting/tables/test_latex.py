"""LaTeX tables without a LaTeX: balanced, rectangular, and with every text as it was given."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.tables import cell_text, table_names, table_of, table_scales, writers
from bench.reporting.tables.table import ColumnHead, OurValue, Table, TableCell, TableLine

TOKEN = re.compile(
    r"\\(?P<command>[a-zA-Z]+)|\\(?P<symbol>.)|(?P<special>[{}&$%#_~^])|(?P<text>[^\\{}&$%#_~^]+)",
    re.DOTALL,
)
ARGUMENTS = {"textsuperscript", "textbf", "caption", "label", "multicolumn"}
TEXT_COMMANDS = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^",
                 "textbar": "|"}  # fmt: skip


def check_structure(text):
    """Fail unless groups, math and environments nest, and every row of the tabular has its cells.

    Reads LaTeX token by token, with the categories that its characters have in a document.
    """
    closing, environments, maths = [], [], False
    cells, width = 0, None
    rest = iter(TOKEN.finditer(text))
    for found in rest:
        command, symbol, special = found["command"], found["symbol"], found["special"]
        if command in ("begin", "end"):
            name = re.match(r"\{(\w+)\}", text[found.end() :])[1]
            if command == "begin":
                environments.append(name)
                if name == "tabular":
                    spec = re.match(r"\{tabular\}\{([lr]+)\}", text[found.end() :])[1]
                    width, cells = len(spec), 0
            else:
                assert environments.pop() == name
        elif command == "multicolumn":
            cells += int(re.match(r"\{(\d+)\}", text[found.end() :])[1]) - 1
        elif symbol == "\\" and environments[-1:] == ["tabular"]:
            assert cells == width - 1, text[: found.end()].rpartition("\n")[2]
            # LaTeX takes a star or a bracket after the end of a row as an option of it.
            assert not re.match(r"\s*[*\[]", text[found.end() :])
            cells = 0
        elif special == "{":
            closing.append(maths)
        elif special == "}":
            assert closing.pop() == maths
        elif special == "$":
            maths = not maths
        elif special == "&":
            assert environments[-1] == "tabular"
            assert not closing
            cells += 1
        else:
            assert special is None, f"{special} is not escaped"
    assert not closing
    assert not environments
    assert not maths


def read_back(latex):
    """Return the text that escaped LaTeX prints."""
    printed = []
    for found in TOKEN.finditer(latex):
        command, symbol, special, text = found.group("command", "symbol", "special", "text")
        if command:
            printed.append({**TEXT_COMMANDS, "pm": "±", "times": "×"}.get(command, f"?{command}?"))
        elif symbol:
            assert symbol in "%_&#${}", symbol
            printed.append(symbol)
        elif text:
            printed.append(text)
        else:
            assert special in "{}$"
    return "".join(printed)


def table(text="x", columns=2):
    head = ColumnHead(text, "%", lower_is_better=False)
    cells = tuple(TableCell(OurValue(float(at), 0.1, None, None, ("r",))) for at in range(columns))
    refused = replace(cells[0], refusal=f"why {text}")
    lines = (
        TableLine(text, text, text, ("r",), cells, (text,)),
        TableLine(text, text, "other", ("r",), (refused, *cells[1:])),
    )
    return Table("a_b", text, False, (head,) * columns, lines, (text,), ())


# What LaTeX reads as something else, and what stands around it in a table.
HOSTILE = st.text(st.sampled_from(list("\\%_&#${}~^<>[]*|±×\n ab-'")), max_size=12)


@given(HOSTILE)
def test_a_text_is_printed_as_it_was_given(text):
    assert read_back(writers._escape_latex(text)) == text.replace("\n", " ")


@given(HOSTILE)
def test_no_text_breaks_the_table(text):
    check_structure(writers.as_latex(table(text)))


@pytest.mark.parametrize("broken", [
    r"\begin{table}\begin{tabular}{ll}a & b \\\end{table}\end{tabular}",
    r"\begin{tabular}{ll}a & b & c \\\end{tabular}",
    r"\begin{tabular}{ll}a & 50% \\\end{tabular}",
    r"\begin{tabular}{ll}\textbf{a & b} \\\end{tabular}",
    r"\begin{tabular}{ll}a & $b \\\end{tabular}",
    "\\begin{tabular}{ll}a & b \\\\\n[1] & c \\\\\\end{tabular}",
])  # fmt: skip
def test_the_check_itself_finds_what_latex_refuses(broken):
    with pytest.raises((AssertionError, IndexError)):
        check_structure(broken)


@pytest.mark.parametrize("name", table_names())
def test_every_shipped_table_is_sound(name):
    for scale in table_scales(name):
        made = table_of(name, [], scale)
        text = writers.as_latex(made)
        check_structure(text)
        assert text.count(r"\caption{") == text.count(r"\label{tab:") == 1
        # Other characters depend on fonts and packages of the document.
        assert text.isascii(), sorted({c for c in text if not c.isascii()})
        for note in cell_text.footnotes(made):
            assert writers._escape_latex(note) in text
