"""CSV, Markdown, LaTeX, HTML and terminal forms."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Rich

from bench.records.atomic_files import write_bytes
from bench.reporting.tables import cell_text
from bench.reporting.tables.table import Table, TableCell, TableLine
from bench.ui import console

RECORD_LINK = "../runs/{run}/record.json"
"""The target of a cell's link, relative to `results/tables`."""


def write_table(table: Table, results_dir: Path) -> list[Path]:
    """Write a table to `results_dir/tables` in every format and return the files."""
    folder = results_dir / "tables"
    paths = []
    for ending, form in TABLE_FORMATS.items():
        path = folder / f"{table.file}.{ending}"
        write_bytes(path, form(table).encode())
        paths.append(path)
    return paths


def table_rows(table: Table) -> list[dict[str, object]]:
    """Return one row per cell: our number, the published one, source and runs; absent is None."""
    found: list[dict[str, object]] = []
    for line in table.lines:
        for head, cell in zip(table.heads, line.cells, strict=True):
            place = {"block": line.block, "setting": line.setting, "row": line.name}
            about = {"table": table.name, "stand_in": table.stand_in, **place}
            # Every row has every key, as a CSV file and a frame need it.
            values = {**dict.fromkeys(VALUE_COLUMNS), **_cell_values(cell)}
            found.append({**about, "column": head.name, "unit": head.unit, **values})
    return found


VALUE_COLUMNS = (
    "ours", "stderr", "low", "high", "theirs", "their_unit", "relation", "difference", "inside",
    "not_subtracted", "source", "trust", "flag", "runs",
)  # fmt: skip


def as_csv(table: Table) -> str:
    """Return the rows of `rows` as CSV."""
    out = io.StringIO()
    names = ("table", "stand_in", "block", "setting", "row", "column", "unit", *VALUE_COLUMNS)
    writer = csv.DictWriter(out, names, lineterminator="\n")
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
    if cell.theirs is not None:
        about = ("relation", "source", "trust", "flag")
        values |= {"theirs": cell.theirs.value, "their_unit": cell.theirs.unit}
        values |= {name: getattr(cell.theirs, name) for name in about}
    return values


def as_markdown(table: Table) -> str:
    """Return one pipe table per section; our numbers link to their records."""
    parts = [f"# {cell_text.heading_text(table)}", ""]
    for block, lines in cell_text.lines_by_section(table):
        heads = ["", "", *map(cell_text.column_text, table.heads)]
        parts += [f"## {block}", "", _markdown_row(heads)]
        parts.append(_markdown_row(["---", "---", *(["---:"] * len(table.heads))]))
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


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _linked_texts(table: Table, line: TableLine, kind: str) -> list[str]:
    """Return a line's texts of one kind; our numbers link to the first run's record."""
    texts = []
    for head, cell in zip(table.heads, line.cells, strict=True):
        text = cell_text.cell_texts(table, cell, head.unit)[cell_text.CELL_KINDS.index(kind)]
        if kind == "ours" and cell.ours is not None:
            text = f"[{text}]({RECORD_LINK.format(run=cell.ours.runs[0])})"
        # A bare pipe would end the cell.
        texts.append(text.replace("|", r"\|"))
    return texts


# Square brackets are wrapped in braces: a row of a tabular ends in `\\`, and a bracket after it
# would be read as its optional argument. `<` and `>` are different glyphs in the default text font
# encoding of LaTeX.
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "<": "$<$", ">": "$>$", "[": "{[}", "]": "{]}",
    "ᶜ": r"\textsuperscript{c}", "ˢ": r"\textsuperscript{s}", "ᵗ": r"\textsuperscript{t}",
}  # fmt: skip


def as_latex(table: Table) -> str:
    r"""Return a booktabs table, which needs `\usepackage{booktabs}`."""
    columns = "ll" + "r" * len(table.heads)
    heads = " & ".join(_escape_latex(cell_text.column_text(head)) for head in table.heads)
    body = [r"\toprule", rf" & & {heads} \\"]
    for block, lines in cell_text.lines_by_section(table):
        body += [r"\midrule", rf"\multicolumn{{{len(columns)}}}{{l}}{{{_escape_latex(block)}}} \\"]
        for line in lines:
            for number, kind in enumerate(cell_text.line_kinds(table, line)):
                label = "" if number else cell_text.line_text(line)
                texts = [
                    cell_text.cell_texts(table, cell, head.unit)[cell_text.CELL_KINDS.index(kind)]
                    for head, cell in zip(table.heads, line.cells, strict=True)
                ]
                body.append(rf"{' & '.join(map(_escape_latex, (label, kind, *texts)))} \\")
    notes = [_escape_latex(note) + r"\\" for note in cell_text.footnotes(table)]
    notes += [_escape_latex(cell_text.agreement_text(found)) + r"\\" for found in table.agreements]
    caption = rf"\caption{{{_escape_latex(cell_text.heading_text(table))}}}"
    tabular = [rf"\begin{{tabular}}{{{columns}}}", *body, r"\bottomrule", r"\end{tabular}"]
    small = [r"\par\medskip\footnotesize\raggedright", *notes]
    whole = [r"\begin{table}", r"\centering", caption, *tabular, *small, r"\end{table}"]
    return "\n".join([*whole, ""])


def _escape_latex(text: str) -> str:
    # Letter by letter: replacing one character after another would escape the backslashes of
    # earlier replacements.
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
.block th { border-top: 1px solid; padding-top: .5rem; text-align: left }
.theirs, .difference { opacity: .75 }
.stand-in { border: 2px solid; font-weight: bold; padding: .5rem .8rem }
"""


def as_html(table: Table) -> str:
    """Return one page without scripts; our numbers link to their records."""
    title = html.escape(table.title)
    stand_in = f'<p class="stand-in">{cell_text.STAND_IN}</p>' if table.stand_in else ""
    heads = "".join(
        f'<th scope="col">{html.escape(cell_text.column_text(h))}</th>' for h in table.heads
    )
    body = []
    for block, lines in cell_text.lines_by_section(table):
        span = len(table.heads) + 2
        name = html.escape(block)
        body.append(f'<tr class="block"><th colspan="{span}" scope="rowgroup">{name}</th></tr>')
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
        cells = "".join(
            f"<td>{_html_cell(table, cell, head.unit, kind)}</td>"
            for head, cell in zip(table.heads, line.cells, strict=True)
        )
        first = f'<th scope="row">{label}</th><td>{kind}</td>'
        found.append(f'<tr class="{kind}">{first}{cells}</tr>')
    return found


def _html_cell(table: Table, cell: TableCell, unit: str, kind: str) -> str:
    text = html.escape(cell_text.cell_texts(table, cell, unit)[cell_text.CELL_KINDS.index(kind)])
    if kind == "ours" and cell.ours is not None:
        # The mean links to the first seed's record, and small numbers to those of the others.
        first, *others = cell.ours.runs
        more = "".join(
            f' <a href="{RECORD_LINK.format(run=run)}" title="run {run}">{place}</a>'
            for place, run in enumerate(others, 2)
        )
        return f'<a href="{RECORD_LINK.format(run=first)}" title="run {first}">{text}</a>{more}'
    if kind == "theirs" and cell.theirs is not None:
        about = html.escape(f"{cell.theirs.source} {cell.theirs.flag}".strip())
        return f'<span title="{about}">{text}</span>'
    return text


TABLE_FORMATS: dict[str, Callable[[Table], str]] = {
    "csv": as_csv,
    "md": as_markdown,
    "tex": as_latex,
    "html": as_html,
}
"""The formats by file suffix."""
UNBOUNDED_WIDTH = 100_000


def print_table(table: Table) -> None:
    """Print all columns of a table, then its footnotes and the order of methods."""
    out = console()
    out.print(cell_text.heading_text(table), style="bold")
    places = list(range(len(table.heads)))
    while places:
        part, shown = _widest_part(table, places, out)
        out.print(part)
        places = places[shown:]
    for note in cell_text.footnotes(table):
        out.print(note)
    if table.agreements:
        out.print("Order of methods, best first", style="bold")
    for found in table.agreements:
        out.print(cell_text.agreement_text(found))


def _widest_part(table: Table, places: Sequence[int], out: Console) -> tuple[Rich, int]:
    """Return a part with as many columns as fit, at least one, and their number."""
    # Without a bound: rich clamps a measurement to the console's width, and all would seem to fit.
    unbounded = out.options.update(max_width=UNBOUNDED_WIDTH)
    for shown in range(len(places), 1, -1):
        part = _rich_part(table, places[:shown])
        if Measurement.get(out, unbounded, part).maximum <= out.width:
            return part, shown
    return _rich_part(table, places[:1]), 1


def _rich_part(table: Table, places: Sequence[int]) -> Rich:
    part = Rich(box=box.SIMPLE_HEAD, show_edge=False)
    part.add_column("", overflow="fold")
    part.add_column("", overflow="fold")
    for place in places:
        part.add_column(cell_text.column_text(table.heads[place]), justify="right", overflow="fold")
    part.add_column("run", overflow="fold")
    for block, lines in cell_text.lines_by_section(table):
        part.add_row(block, style="bold")
        for line in lines:
            texts = [
                cell_text.cell_texts(table, line.cells[place], table.heads[place].unit)
                for place in places
            ]
            for kind in cell_text.line_kinds(table, line):
                first = kind == cell_text.line_kinds(table, line)[0]
                cells = [text[cell_text.CELL_KINDS.index(kind)] for text in texts]
                runs = ", ".join(run[:8] for run in line.runs) if kind == "ours" else ""
                part.add_row(cell_text.line_text(line) if first else "", kind, *cells, runs)
        part.add_section()
    return part
