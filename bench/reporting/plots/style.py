"""Style of figures: colours for colour-blind readers, panels, axes, legends.

Families of runs differ in colour, marker, line and hatch, so that they can be distinguished in
greyscale as well. Colours: Okabe and Ito, Color Universal Design (2008), without the yellow, which
is too light for lines on white. Heat maps use cividis, whose lightness increases with the value.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import LineStyleType

from bench.errors import UserError
from bench.records.files import refuse_unwritable
from bench.records.record import AVERAGE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LINE_STYLES: tuple[LineStyleType, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "***")
HEATMAP = "cividis"
INK, GREY = "#000000", "#7F7F7F"
FIGURE_FORMATS = ("png", "svg", "pdf")
RC_PARAMS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 6,
    "errorbar.capsize": 2,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "slimbench",
    "text.parse_math": False,
}
"""Names of models and methods are shown as they are: with math, a `$` in one of them is an error.
Text remains text in SVG and PDF (font type 42, no outlines). The fixed salt for SVG ids makes
equal figures equal files."""


@dataclass(frozen=True)
class SeriesStyle:
    """Style of one family."""

    colour: str
    marker: str
    line: LineStyleType
    hatch: str


DENSE_STYLE = SeriesStyle(INK, "*", "-", "")
"""The dense model is black with a star in all figures."""


def series_styles(families: Iterable[str]) -> dict[str, SeriesStyle]:
    """Return a style per family in order of appearance; the dense model has its own."""
    named = dict.fromkeys(families)
    # The cycles of colours, markers, lines and hatches have different lengths, so families with
    # the same colour differ in the rest.
    others = [name for name in named if name != "dense"]
    found = dict(zip(others, islice(_cycle_styles(), len(others)), strict=True))
    return {"dense": DENSE_STYLE, **found} if "dense" in named else found


def _cycle_styles() -> Iterator[SeriesStyle]:
    number = 0
    while True:
        yield SeriesStyle(
            colour=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            line=LINE_STYLES[number % len(LINE_STYLES)],
            hatch=HATCHES[number % len(HATCHES)],
        )
        number += 1


def tint(colour: str) -> tuple[float, float, float]:
    """Return a colour halfway to white, on which a hatch is visible even in greyscale."""
    red, green, blue = to_rgb(colour)
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


@contextmanager
def plot_settings() -> Iterator[None]:
    """Apply our settings within the context and restore the process's settings afterwards."""
    with mpl.rc_context(RC_PARAMS):
        yield


def check_figure_file(path: Path) -> None:
    """Raise if a figure cannot be written to a path; called before data are read.

    Raises:
        UserError: the format is not one of the three, or the file cannot be written.
    """
    if path.suffix.removeprefix(".").lower() not in FIGURE_FORMATS:
        raise UserError(f"--output {path}: the name must end in {', '.join(FIGURE_FORMATS)}")
    refuse_unwritable("--output", path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix; equal figures give equal files."""
    suffix = path.suffix.removeprefix(".").lower()
    # matplotlib writes its version into PNG and the time into SVG and PDF, so that files would
    # always differ.
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=suffix, metadata=undated[suffix])


MAX_PANELS = 4
TITLE_WIDTH = 44
"""Letters per line of a panel's title."""
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.2
"""Inches per panel."""
LEGEND_LINE_HEIGHT, LEGEND_LETTER_WIDTH = 0.2, 0.085
"""Inches: height of a line of the legend, and width of a letter in it."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def draw_panels(
    frame: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None]
) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per model and benchmark, each drawn from its own rows.

    Raises:
        UserError: there are more panels than fit side by side.
    """
    # Only runs of one model on one benchmark share axes, because their numbers are comparable.
    panels = list(frame.groupby(["model", "benchmark"], sort=False))
    figure, axes = _panel_figure([f"{model} on {benchmark}" for (model, benchmark), _ in panels])
    for each, (_, group) in zip(axes, panels, strict=True):
        draw(each, group)
    return figure, axes


def _panel_figure(names: list[str]) -> tuple[Figure, list[Axes]]:
    if len(names) > MAX_PANELS:
        raise UserError(
            f"the runs span {len(names)} pairs of model and benchmark, but a figure has at most "
            f"{MAX_PANELS}: name the runs to draw"
        )
    figure = Figure(figsize=(PANEL_WIDTH * len(names), PANEL_HEIGHT), layout="constrained")
    axes = list(figure.subplots(1, len(names), squeeze=False)[0])
    for each, name in zip(axes, names, strict=True):
        each.set_title(textwrap.fill(name, TITLE_WIDTH), loc="left")
    return figure, axes


def add_legend(
    figure: Figure, handles: Sequence[Artist | Container], title: str | None = None
) -> None:
    """Put a legend below all panels and enlarge the figure for it."""
    # The width is estimated from the number of letters: matplotlib knows text sizes only after
    # drawing, and changing the figure's height then would require a second layout.
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(
        1, min(len(handles), int(figure.get_figwidth() / (0.6 + longest * LEGEND_LETTER_WIDTH)))
    )
    rows = -(-len(handles) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + rows * LEGEND_LINE_HEIGHT)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title)


def family_handles(families: dict[str, SeriesStyle], *, joined: bool) -> list[Line2D]:
    """Return a legend handle per family: its marker, and its line if points are `joined`."""
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker,
            linestyle=look.line if joined else "none", label=name,
        )
        for name, look in families.items()
    ]  # fmt: skip


def zeroed_handle() -> Line2D:
    """Return the legend handle of points with savings that are not real."""
    return Line2D(
        [], [], color=INK, marker="o", markerfacecolor="white", linestyle="none",
        label="zeroed, masked or unconfirmed: no real saving",
    )  # fmt: skip


def label_metric_axis(axes: Axes, name: str, task: str, *, higher_is_better: bool) -> None:
    """Label the axis of a headline metric, including which direction is better."""
    shown = name.replace("mean", "average") if task == AVERAGE else f"{task} {name}"
    axes.set_ylabel(f"{shown} ({'higher' if higher_is_better else 'lower'} is better)")


def label_unit_axis(axes: Axes, name: str, unit: str, largest: float) -> None:
    """Label the axis of a cost, with a decimal prefix for the largest value."""
    factor, prefix = next((p for p in PREFIXES if p[0] <= abs(largest)), PREFIXES[-1])
    # matplotlib's own formatter would put a factor such as 1e9 at the end of the axis.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    shown = f"{prefix}{'' if unit == '1' else unit}"
    axes.set_xlabel(f"{name} ({shown})" if shown else name)
