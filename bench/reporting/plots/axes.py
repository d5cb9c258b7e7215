"""Shared parts of figures: panels side by side, legends, axes with units."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.errors import UserError
from bench.reporting.plots.style import INK, Look

MOST_PANELS = 4
WIDTH, HEIGHT = 4.2, 3.2
"""Inches per panel."""
LINE, LETTER = 0.2, 0.085
"""Inches: the height of a line of the legend and the width of a letter in it."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def side_by_side(names: list[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one titled panel per name.

    Raises:
        UserError: there are more panels than fit side by side.
    """
    if len(names) > MOST_PANELS:
        raise UserError(
            f"the runs span {len(names)} pairs of model and benchmark, but a figure holds at most "
            f"{MOST_PANELS}: name the runs to draw"
        )
    figure = Figure(figsize=(WIDTH * len(names), HEIGHT), layout="constrained")
    axes = list(figure.subplots(1, len(names), squeeze=False)[0])
    for each, name in zip(axes, names, strict=True):
        each.set_title(name, loc="left")
    return figure, axes


def legend(figure: Figure, handles: Sequence[Artist], title: str | None = None) -> None:
    """Put one legend below all panels and enlarge the figure to make room for it."""
    # The width is estimated from the number of letters: matplotlib knows real text sizes only after
    # drawing, and a figure height set then would need a second layout.
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.6 + longest * LETTER))))
    rows = -(-len(handles) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + rows * LINE)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title)


def of_families(families: dict[str, Look], *, joined: bool) -> list[Line2D]:
    """Return a legend handle per family: its marker, and its line if points are `joined`."""
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker,
            linestyle=look.line if joined else "none", label=name,
        )
        for name, look in families.items()
    ]  # fmt: skip


def hollow() -> Line2D:
    """Return the legend handle of points whose weights are only zeroed or masked."""
    return Line2D(
        [], [], color=INK, marker="o", markerfacecolor="white", linestyle="none",
        label="zeroed or masked: no real saving",
    )  # fmt: skip


def metric_axis(axes: Axes, name: str, task: str, higher_is_better: bool) -> None:
    """Label the axis of a headline metric, and say so if lower is better."""
    shown = name.replace("mean", "average") if task == "average" else f"{task} {name}"
    axes.set_ylabel(shown if higher_is_better else f"{shown} (lower is better)")


def unit_axis(axes: Axes, name: str, unit: str, largest: float) -> None:
    """Label the axis of a cost, with the decimal prefix that suits the largest value."""
    factor, prefix = next((p for p in PREFIXES if p[0] <= abs(largest)), PREFIXES[-1])
    # matplotlib's own formatter would write a factor such as 1e9 at the end of the axis.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    shown = f"{prefix}{'' if unit == '1' else unit}"
    axes.set_xlabel(f"{name}, {shown}" if shown else name)
