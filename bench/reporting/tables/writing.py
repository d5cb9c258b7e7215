"""A paper's table as files: CSV for programs; Markdown, LaTeX (booktabs) and HTML for readers."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from pathlib import Path

from bench.records.atomic import write_bytes
from bench.reporting.tables import wording
from bench.reporting.tables.table import Cell, Line, Table

RECORD = "../runs/{run}/record.json"
"""The target of a cell's link, relative to `results/tables`."""


def write(table: Table, results_dir: Path) -> list[Path]:
    """Write a table to `results_dir/tables` in every format and return the files."""
    folder = results_dir / "tables"
    paths = []
    for ending, form in FORMS.items():
        path = folder / f"{table.file}.{ending}"
        write_bytes(path, form(table).encode())
        paths.append(path)
    return paths


def rows(table: Table) -> list[dict[str, object]]:
    """Return one row per cell: our number, the published one, source and runs; absent is None."""
    found: list[dict[str, object]] = []
    for line in table.lines:
        for head, cell in zip(table.heads, line.cells, strict=True):
            place = {"block": line.block, "setting": line.setting, "row": line.name}
            about = {"table": table.name, "stand_in": table.stand_in, **place}
            # Every row has every key, as a CSV file and a frame need it.
            values = {**dict.fromkeys(VALUES), **_values(cell)}
            found.append({**about, "column": head.name, "unit": head.unit, **values})
    return found


VALUES = (
    "ours", "stderr", "low", "high", "theirs", "their_unit", "relation", "difference", "inside",
    "not_subtracted", "source", "trust", "flag", "runs",
)  # fmt: skip


def as_csv(table: Table) -> str:
    """Return the rows of `rows` as CSV."""
    out = io.StringIO()
    names = ("table", "stand_in", "block", "setting", "row", "column", "unit", *VALUES)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(table))
    return out.getvalue()


def _values(cell: Cell) -> dict[str, object]:
    values: dict[str, object] = {
        "difference": cell.difference,
        "inside": cell.inside,
        "not_subtracted": cell.refusal,
    }
    if cell.ours is not None:
        values |= {"ours": cell.ours.value, "runs": " ".join(cell.ours.runs)}
        values |= {name: getattr(cell.ours, name) for name in ("stderr", "low", "high")}
    if cell.theirs is not None:
        about = ("relation", "source", "trust", "flag")
        values |= {"theirs": cell.theirs.value, "their_unit": cell.theirs.unit}
        values |= {name: getattr(cell.theirs, name) for name in about}
    return values


def as_markdown(table: Table) -> str:
    """Return one pipe table per section; our numbers link to their records."""
    parts = [f"# {wording.heading(table)}", ""]
    for block, lines in wording.blocks(table):
        heads = ["", "", *map(wording.head, table.heads)]
        parts += [f"## {block}", "", _piped(heads)]
        parts.append(_piped(["---", "---", *(["---:"] * len(table.heads))]))
        for line in lines:
            for number, kind in enumerate(wording.kinds(table, line)):
                label = "" if number else wording.label(line)
                parts.append(_piped([label, kind, *_linked(table, line, kind)]))
        parts.append("")
    parts += [f"- {note}" for note in wording.footnotes(table)]
    if table.agreements:
        parts += ["", "## Order of methods, best first", ""]
        parts += [f"- {wording.agreement(found)}" for found in table.agreements]
    return "\n".join([*parts, ""])


def _piped(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _linked(table: Table, line: Line, kind: str) -> list[str]:
    """Return a line's texts of one kind; our numbers link to the first run's record."""
    texts = []
    for head, cell in zip(table.heads, line.cells, strict=True):
        text = wording.words(table, cell, head.unit)[wording.KINDS.index(kind)]
        if kind == "ours" and cell.ours is not None:
            text = f"[{text}]({RECORD.format(run=cell.ours.runs[0])})"
        # A bare pipe would end the cell.
        texts.append(text.replace("|", r"\|"))
    return texts


# Square brackets are wrapped in braces: a row of a tabular ends in `\\`, and a bracket after it
# would be read as its optional argument. `<` and `>` are different glyphs in the default text font
# encoding of LaTeX.
LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "<": "$<$", ">": "$>$", "[": "{[}", "]": "{]}",
    "ᶜ": r"\textsuperscript{c}", "ˢ": r"\textsuperscript{s}", "ᵗ": r"\textsuperscript{t}",
}  # fmt: skip


def as_latex(table: Table) -> str:
    r"""Return a booktabs table, which needs `\usepackage{booktabs}`."""
    columns = "ll" + "r" * len(table.heads)
    heads = " & ".join(_tex(wording.head(head)) for head in table.heads)
    body = [r"\toprule", rf" & & {heads} \\"]
    for block, lines in wording.blocks(table):
        body += [r"\midrule", rf"\multicolumn{{{len(columns)}}}{{l}}{{{_tex(block)}}} \\"]
        for line in lines:
            for number, kind in enumerate(wording.kinds(table, line)):
                label = "" if number else wording.label(line)
                texts = [
                    wording.words(table, cell, head.unit)[wording.KINDS.index(kind)]
                    for head, cell in zip(table.heads, line.cells, strict=True)
                ]
                body.append(rf"{' & '.join(map(_tex, (label, kind, *texts)))} \\")
    notes = [_tex(note) + r"\\" for note in wording.footnotes(table)]
    notes += [_tex(wording.agreement(found)) + r"\\" for found in table.agreements]
    caption = rf"\caption{{{_tex(wording.heading(table))}}}"
    tabular = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\bottomrule", r"\end{tabular}"]
    small = [r"\par\medskip\footnotesize\raggedright", *notes]
    whole = [r"\begin{table}", r"\centering", caption, *tabular, *small, r"\end{table}"]
    return "\n".join([*whole, ""])


def _tex(text: str) -> str:
    # Letter by letter: replacing one character after another would escape the backslashes of
    # earlier replacements.
    return "".join(LATEX.get(letter, letter) for letter in text)


STYLE = """\
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem }
body { padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th[scope=row], td:nth-child(2), th:first-child { text-align: left }
thead th { border-bottom: 2px solid }
.block th { border-top: 1px solid; padding-top: .5rem; text-align: left }
.theirs, .difference { opacity: .75 }
.stand-in { border: 2px solid; font-weight: bold; padding: .5rem .8rem }
"""


def as_html(table: Table) -> str:
    """Return one page without scripts; our numbers link to their records."""
    title = html.escape(table.title)
    stand_in = f'<p class="stand-in">{wording.STAND_IN}</p>' if table.stand_in else ""
    heads = "".join(f'<th scope="col">{html.escape(wording.head(h))}</th>' for h in table.heads)
    body = []
    for block, lines in wording.blocks(table):
        span = len(table.heads) + 2
        name = html.escape(block)
        body.append(f'<tr class="block"><th colspan="{span}" scope="rowgroup">{name}</th></tr>')
        body += [row for line in lines for row in _html_rows(table, line)]
    notes = [*wording.footnotes(table), *map(wording.agreement, table.agreements)]
    below = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'{stand_in}\n<div class="wide"><table>\n<thead><tr><th></th><th></th>{heads}</tr></thead>'
        f"\n<tbody>\n{chr(10).join(body)}\n</tbody>\n</table></div>\n<ul>{below}</ul>\n"
        "</body>\n</html>\n"
    )


def _html_rows(table: Table, line: Line) -> list[str]:
    found = []
    for number, kind in enumerate(wording.kinds(table, line)):
        label = "" if number else html.escape(wording.label(line))
        cells = "".join(
            f"<td>{_html_cell(table, cell, head.unit, kind)}</td>"
            for head, cell in zip(table.heads, line.cells, strict=True)
        )
        first = f'<th scope="row">{label}</th><td>{kind}</td>'
        found.append(f'<tr class="{kind}">{first}{cells}</tr>')
    return found


def _html_cell(table: Table, cell: Cell, unit: str, kind: str) -> str:
    text = html.escape(wording.words(table, cell, unit)[wording.KINDS.index(kind)])
    if kind == "ours" and cell.ours is not None:
        # The mean links to the first seed's record, and small numbers to those of the others.
        first, *others = cell.ours.runs
        more = "".join(
            f' <a href="{RECORD.format(run=run)}" title="run {run}">{place}</a>'
            for place, run in enumerate(others, 2)
        )
        return f'<a href="{RECORD.format(run=first)}" title="run {first}">{text}</a>{more}'
    if kind == "theirs" and cell.theirs is not None:
        about = html.escape(f"{cell.theirs.source} {cell.theirs.flag}".strip())
        return f'<span title="{about}">{text}</span>'
    return text


FORMS: dict[str, Callable[[Table], str]] = {
    "csv": as_csv,
    "md": as_markdown,
    "tex": as_latex,
    "html": as_html,
}
"""The formats by file suffix."""
