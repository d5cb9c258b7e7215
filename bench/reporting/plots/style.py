"""Style of figures: colours that colour-blind readers can tell apart, and never colour alone.

A family of runs has its own colour, marker, line and hatch, so that a figure says the same in
greyscale. Colours: Okabe and Ito, Color Universal Design (2008), without the yellow, which is too
light for lines on white. Heat maps use cividis, whose lightness grows with the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from bench.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "***")
HEAT = "cividis"
INK, PALE = "#000000", "#7F7F7F"
FORMATS = ("png", "svg", "pdf")

SETTINGS: dict[Any, Any] = {
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
}
"""Text remains text in SVG and PDF (font type 42, no outlines), and the fixed salt for SVG ids
makes equal figures equal files."""


@dataclass(frozen=True)
class Look:
    """Style of one family."""

    colour: str
    marker: str
    line: Any
    hatch: str


DENSE = Look(INK, "*", "-", "")
"""The dense model is black and has a star everywhere."""


def looks(families: Iterable[str]) -> dict[str, Look]:
    """Return a style per family in order of appearance; the dense model has its own."""
    named = dict.fromkeys(families)
    # The cycles of colours, markers, lines and hatches have different lengths, so families that
    # share a colour differ in the rest.
    others = [name for name in named if name != "dense"]
    found = dict(zip(others, islice(_cycle(), len(others)), strict=True))
    return {"dense": DENSE, **found} if "dense" in named else found


def _cycle() -> Iterator[Look]:
    number = 0
    while True:
        pick = (each[number % len(each)] for each in (COLOURS, MARKERS, LINES, HATCHES))
        yield Look(*pick)
        number += 1


def tint(colour: str) -> tuple[float, float, float]:
    """Return a colour half-way to white: a hatch on it stays visible, in greyscale as well."""
    red, green, blue = to_rgb(colour)
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


@contextmanager
def drawing() -> Iterator[None]:
    """Apply our settings within the context and restore the process's settings afterwards."""
    with mpl.rc_context(SETTINGS):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix; equal figures give equal files.

    Raises:
        UserError: the format is none of the three, or the file cannot be written.
    """
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise UserError(f"--output {path}: the name must end in {', '.join(FORMATS)}")
    # matplotlib writes its version into PNG and the time into SVG and PDF, which would make every
    # file differ.
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=suffix, metadata=undated[suffix])
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
