"""The formats of a finished table: CSV, Markdown, LaTeX, HTML, and terminal.

All formats except CSV show cells with the texts of `cell_text`; CSV has plain values.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from bench.records.files import write_bytes
from bench.reporting.tables import cell_text
from bench.reporting.tables.table import ColumnHead, Table, TableCell, TableLine
from bench.ui import console, terminal_table, widest_fitting

RECORD_LINK = "../runs/{run}/record.json"
"""Target of a cell's link, relative to `results/tables`."""


TABLE_FOLDER = "tables"
"""Folder of written tables in a results folder."""


def write_table(table: Table, results_dir: Path) -> list[Path]:
    """Write a table to `results_dir/tables` in every format and return the files."""
    folder = results_dir / TABLE_FOLDER
    paths = []
    for ending, form in TABLE_FORMATS.items():
        path = folder / f"{table.file}.{ending}"
        write_bytes(path, form(table).encode())
        paths.append(path)
    return paths


def table_rows(table: Table) -> list[dict[str, object]]:
    """Return one row per cell: our number, the published one, source and runs; None if absent."""
    found: list[dict[str, object]] = []
    for line in table.lines:
        for head, cell in zip(table.columns, line.cells, strict=True):
            position = {"section": line.section, "variant": line.variant, "row": line.name}
            about = {"table": table.name, "stand_in": table.stand_in, **position}
            # Every row has all keys, as CSV files and data frames require.
            values = {**dict.fromkeys(VALUE_COLUMNS), **_cell_values(cell)}
            # The column of a stand-in does not have the name of the replaced data.
            column = {"column": head.text if table.stand_in else head.name, "unit": head.unit}
            found.append({**about, **column, "scored_on": head.label, **values})
    return found


VALUE_COLUMNS = (
    "ours", "stderr", "low", "high", "theirs", "their_unit", "relation", "difference", "inside",
    "not_subtracted", "source", "trust", "flag", "runs",
)  # fmt: skip


def as_csv(table: Table) -> str:
    """Return the rows of `table_rows` as CSV."""
    out = io.StringIO()
    about = ("table", "stand_in", "section", "variant", "row", "column", "unit", "scored_on")
    writer = csv.DictWriter(out, (*about, *VALUE_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows(table))
    return out.getvalue()


def _cell_values(cell: TableCell) -> dict[str, object]:
    values: dict[str, object] = {
        "difference": cell.difference,
        "inside": cell.inside,
        "not_subtracted": cell.refusal,
    }
    if cell.ours is not None:
        values |= {"ours": cell.ours.value, "runs": " ".join(cell.ours.runs)}
        values |= {name: getattr(cell.ours, name) for name in ("stderr", "low", "high")}
    if cell.published is not None:
        about = ("relation", "source", "trust", "flag")
        values |= {"theirs": cell.published.value, "their_unit": cell.published.unit}
        values |= {name: getattr(cell.published, name) for name in about}
    return values


def as_markdown(table: Table) -> str:
    """Return one pipe table per section; our numbers link to their records."""
    parts = [f"# {cell_text.heading_text(table)}", ""]
    for section, lines in cell_text.lines_by_section(table):
        heads = ["", "", *map(cell_text.column_text, table.columns)]
        parts += [f"## {section}", "", _markdown_row(heads)]
        parts.append(_markdown_row(["---", "---", *(["---:"] * len(table.columns))]))
        for line in lines:
            for number, kind in enumerate(cell_text.line_kinds(table, line)):
                label = "" if number else cell_text.line_text(line)
                parts.append(_markdown_row([label, kind, *_linked_texts(table, line, kind)]))
        parts.append("")
    parts += [f"- {note}" for note in cell_text.footnotes(table)]
    if table.agreements:
        parts += ["", "## Order of methods, best first", ""]
        parts += [f"- {cell_text.agreement_text(found)}" for found in table.agreements]
    return "\n".join([*parts, ""])


def _kind_text(table: Table, cell: TableCell, head: ColumnHead, kind: str) -> str:
    """Return one of a cell's texts: `ours`, `theirs` or `difference`."""
    return cell_text.cell_texts(table, cell, head)[cell_text.CELL_KINDS.index(kind)]


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _linked_texts(table: Table, line: TableLine, kind: str) -> list[str]:
    """Return a line's texts of one kind; our numbers link to the first run's record."""
    texts = []
    best = _best_columns(table, line, kind)
    for column, (head, cell) in enumerate(zip(table.columns, line.cells, strict=True)):
        text = _kind_text(table, cell, head, kind)
        if kind == "ours" and cell.ours is not None:
            text = f"[{text}]({RECORD_LINK.format(run=cell.ours.runs[0])})"
        text = f"**{text}**" if column in best else text
        # A pipe would end the cell.
        texts.append(text.replace("|", r"\|"))
    return texts


def _best_columns(table: Table, line: TableLine, kind: str) -> set[int]:
    """Return the columns in which a line's own number is the best of its kind."""
    place = table.lines.index(line)
    found = cell_text.best_cells(table) if kind == "ours" else ()
    return {column for row, column in found if row == place}


# Square brackets and stars are wrapped in braces, because after the `\\` at the end of a row LaTeX
# would read them as its option. `<`, `>` and `|` are other glyphs in LaTeX's default font encoding.
# A line break could end a paragraph, which is not allowed in a caption.
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$", "|": r"\textbar{}", "[": "{[}",
    "]": "{]}", "*": "{*}", "\n": " ",
    "ᶜ": r"\textsuperscript{c}", "ˢ": r"\textsuperscript{s}", "ᵗ": r"\textsuperscript{t}",
}  # fmt: skip


def as_latex(table: Table) -> str:
    r"""Return a booktabs table, which needs `\usepackage{booktabs}`."""
    columns = "ll" + "r" * len(table.columns)
    heads = " & ".join(_escape_latex(cell_text.column_text(head)) for head in table.columns)
    body = [r"\toprule", rf" & & {heads} \\"]
    for section, lines in cell_text.lines_by_section(table):
        body += [
            r"\midrule",
            rf"\multicolumn{{{len(columns)}}}{{l}}{{{_escape_latex(section)}}} \\",
        ]
        for line in lines:
            for number, kind in enumerate(cell_text.line_kinds(table, line)):
                label = "" if number else cell_text.line_text(line)
                best = _best_columns(table, line, kind)
                texts = [
                    _escape_latex(_kind_text(table, cell, head, kind))
                    for head, cell in zip(table.columns, line.cells, strict=True)
                ]
                texts = [rf"\textbf{{{t}}}" if i in best else t for i, t in enumerate(texts)]
                body.append(rf"{' & '.join((_escape_latex(label), kind, *texts))} \\")
    notes = [_escape_latex(note) + r"\\" for note in cell_text.footnotes(table)]
    notes += [_escape_latex(cell_text.agreement_text(found)) + r"\\" for found in table.agreements]
    caption = rf"\caption{{{_escape_latex(cell_text.heading_text(table))}}}"
    tabular = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\bottomrule", r"\end{tabular}"]
    # A paragraph without following text would add space below the table.
    small = [r"\par\medskip\footnotesize\raggedright", *notes] if notes else []
    label = rf"\label{{tab:{table.file.replace('_', '-')}}}"
    whole = [r"\begin{table}", r"\centering", caption, label, *tabular, *small, r"\end{table}"]
    return "\n".join([*whole, ""])


def _escape_latex(text: str) -> str:
    # Letter by letter, because successive replacements would escape backslashes of earlier ones.
    return "".join(LATEX_ESCAPES.get(letter, letter) for letter in text)


HTML_STYLE = """\
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem }
body { padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th[scope=row], td:nth-child(2), th:first-child { text-align: left }
thead th { border-bottom: 2px solid }
.section th { border-top: 1px solid; padding-top: .5rem; text-align: left }
.theirs, .difference { opacity: .75 }
.stand-in { border: 2px solid; font-weight: bold; padding: .5rem .8rem }
"""


def as_html(table: Table) -> str:
    """Return one page without scripts; our numbers link to their records."""
    title = html.escape(table.title)
    stand_in = f'<p class="stand-in">{cell_text.STAND_IN}</p>' if table.stand_in else ""
    heads = "".join(
        f'<th scope="col">{html.escape(cell_text.column_text(h))}</th>' for h in table.columns
    )
    body = []
    for section, lines in cell_text.lines_by_section(table):
        span = len(table.columns) + 2
        name = html.escape(section)
        body.append(f'<tr class="section"><th colspan="{span}" scope="rowgroup">{name}</th></tr>')
        body += [row for line in lines for row in _html_rows(table, line)]
    notes = [*cell_text.footnotes(table), *map(cell_text.agreement_text, table.agreements)]
    below = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>\n{HTML_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'{stand_in}\n<div class="wide"><table>\n<thead><tr><th></th><th></th>{heads}</tr></thead>'
        f"\n<tbody>\n{chr(10).join(body)}\n</tbody>\n</table></div>\n<ul>{below}</ul>\n"
        "</body>\n</html>\n"
    )


def _html_rows(table: Table, line: TableLine) -> list[str]:
    found = []
    for number, kind in enumerate(cell_text.line_kinds(table, line)):
        label = "" if number else html.escape(cell_text.line_text(line))
        best = _best_columns(table, line, kind)
        texts = [
            _html_cell(table, cell, head, kind)
            for head, cell in zip(table.columns, line.cells, strict=True)
        ]
        texts = [f"<b>{text}</b>" if i in best else text for i, text in enumerate(texts)]
        cells = "".join(f"<td>{text}</td>" for text in texts)
        first = f'<th scope="row">{label}</th><td>{kind}</td>'
        found.append(f'<tr class="{kind}">{first}{cells}</tr>')
    return found


def _html_cell(table: Table, cell: TableCell, head: ColumnHead, kind: str) -> str:
    text = html.escape(_kind_text(table, cell, head, kind))
    if kind == "ours" and cell.ours is not None:
        # The mean links to the first seed's record, and small numbers link to the others.
        first, *others = cell.ours.runs
        more = "".join(
            f' <a href="{RECORD_LINK.format(run=run)}" title="run {run}">{number}</a>'
            for number, run in enumerate(others, 2)
        )
        return f'<a href="{RECORD_LINK.format(run=first)}" title="run {first}">{text}</a>{more}'
    if kind == "theirs" and cell.published is not None:
        about = html.escape(f"{cell.published.source} {cell.published.flag}".strip())
        return f'<span title="{about}">{text}</span>'
    return text


TABLE_FORMATS: dict[str, Callable[[Table], str]] = {
    "csv": as_csv,
    "md": as_markdown,
    "tex": as_latex,
    "html": as_html,
}
"""The formats by file suffix."""


def print_table(table: Table) -> None:
    """Print all columns of a table, then its footnotes and the order of methods."""
    out = console()
    out.print(cell_text.heading_text(table), style="bold")
    columns = range(len(table.columns))
    while columns:
        part, shown = _widest_part(table, columns, out)
        out.print(part)
        columns = columns[shown:]
    for note in cell_text.footnotes(table):
        out.print(note)
    if table.agreements:
        out.print("Order of methods, best first", style="bold")
    for agreement in table.agreements:
        out.print(cell_text.agreement_text(agreement))


def _widest_part(table: Table, columns: range, out: Console) -> tuple[RichTable, int]:
    """Return a table with as many of the columns as fit, at least one, and their number."""
    return widest_fitting(lambda count: _rich_part(table, columns[:count]), len(columns), out)


def _rich_part(table: Table, columns: range) -> RichTable:
    headings = [cell_text.column_text(table.columns[column]) for column in columns]
    part = terminal_table(headings, labels=2)
    part.add_column("run", overflow="fold")
    for section, lines in cell_text.lines_by_section(table):
        part.add_row(section, style="bold")
        for line in lines:
            texts = [
                cell_text.cell_texts(table, line.cells[column], table.columns[column])
                for column in columns
            ]
            for number, kind in enumerate(cell_text.line_kinds(table, line)):
                label = "" if number else cell_text.line_text(line)
                cells = [text[cell_text.CELL_KINDS.index(kind)] for text in texts]
                runs = ", ".join(run[:8] for run in line.runs) if kind == "ours" else ""
                part.add_row(label, kind, *cells, runs)
        part.add_section()
    return part
