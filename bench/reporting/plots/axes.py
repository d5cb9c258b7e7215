"""What several kinds of figure share: panels side by side, legends, units."""

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
"""Inches of one panel."""
LINE, LETTER = 0.2, 0.085
"""Inches of a legend's line and of one letter in it."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def side_by_side(names: list[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one titled panel for each name.

    Raises:
        UserError: there are more than fit side by side.
    """
    if len(names) > MOST_PANELS:
        raise UserError(
            f"the runs are of {len(names)} models and benchmarks, and {MOST_PANELS} fit side by "
            f"side: name the runs to draw"
        )
    figure = Figure(figsize=(WIDTH * len(names), HEIGHT), layout="constrained")
    axes = list(figure.subplots(1, len(names), squeeze=False)[0])
    for each, name in zip(axes, names, strict=True):
        each.set_title(name, loc="left")
    return figure, axes


def legend(figure: Figure, handles: Sequence[Artist], title: str | None = None) -> None:
    """Put one legend below all panels and make the figure as much taller as it needs."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.6 + longest * LETTER))))
    rows = -(-len(handles) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + rows * LINE)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title)


def of_families(families: dict[str, Look], *, joined: bool) -> list[Line2D]:
    """Return what a legend shows of each family: its marker, and its line if points are joined."""
    return [
        Line2D(
            [], [], color=look.colour, marker=look.marker,
            linestyle=look.line if joined else "none", label=name,
        )
        for name, look in families.items()
    ]  # fmt: skip


def hollow() -> Line2D:
    """Explain points whose saving is not real."""
    return Line2D(
        [], [], color=INK, marker="o", markerfacecolor="white", linestyle="none",
        label="zeroed or masked: nothing is saved",
    )  # fmt: skip


def metric_axis(axes: Axes, name: str, task: str, higher_is_better: bool) -> None:
    """Name the axis of a headline, and say which way is better where that is not up."""
    shown = name.replace("mean", "average") if task == "average" else f"{task} {name}"
    axes.set_ylabel(shown if higher_is_better else f"{shown} (less is better)")


def unit_axis(axes: Axes, name: str, unit: str, largest: float) -> None:
    """Name the axis of a cost, in the unit with the decimal prefix that its largest value needs."""
    factor, prefix = next((p for p in PREFIXES if p[0] <= abs(largest)), PREFIXES[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    shown = f"{prefix}{'' if unit == '1' else unit}"
    axes.set_xlabel(f"{name}, {shown}" if shown else name)
