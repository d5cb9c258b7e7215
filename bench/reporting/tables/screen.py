"""A paper's table on the terminal; columns beyond its width continue in further parts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Rich

from bench.reporting.tables import wording
from bench.reporting.tables.table import Table
from bench.reporting.terminal import console

UNBOUNDED = 100_000


def print_table(table: Table) -> None:
    """Print all columns of a table, then its footnotes and the order of methods."""
    out = console()
    out.print(wording.heading(table), style="bold")
    places = list(range(len(table.heads)))
    while places:
        part, shown = _widest(table, places, out)
        out.print(part)
        places = places[shown:]
    for note in wording.footnotes(table):
        out.print(note, markup=False)
    if table.agreements:
        out.print("Order of methods, best first", style="bold")
    for found in table.agreements:
        out.print(wording.agreement(found), markup=False)


def _widest(table: Table, places: Sequence[int], out: Console) -> tuple[Rich, int]:
    """Return a part with as many columns as fit, at least one, and their number."""
    # Without a bound: rich clamps a measurement to the console's width, and all would seem to fit.
    unbounded = out.options.update(max_width=UNBOUNDED)
    for shown in range(len(places), 1, -1):
        part = _part(table, places[:shown])
        if Measurement.get(out, unbounded, part).maximum <= out.width:
            return part, shown
    return _part(table, places[:1]), 1


def _part(table: Table, places: Sequence[int]) -> Rich:
    part = Rich(box=box.SIMPLE_HEAD, show_edge=False)
    part.add_column("", overflow="fold")
    part.add_column("", overflow="fold")
    for place in places:
        part.add_column(wording.head(table.heads[place]), justify="right", overflow="fold")
    part.add_column("run", overflow="fold")
    for block, lines in wording.blocks(table):
        part.add_row(f"[bold]{block}[/bold]")
        for line in lines:
            texts = [
                wording.words(table, line.cells[place], table.heads[place].unit) for place in places
            ]
            for kind in wording.kinds(table, line):
                first = kind == wording.kinds(table, line)[0]
                cells = [text[wording.KINDS.index(kind)] for text in texts]
                runs = ", ".join(run[:8] for run in line.runs) if kind == "ours" else ""
                # References to footnotes such as `[1]` are no rich markup.
                shown = [cell.replace("[", r"\[") for cell in cells]
                part.add_row(wording.label(line) if first else "", kind, *shown, runs)
        part.add_section()
    return part
