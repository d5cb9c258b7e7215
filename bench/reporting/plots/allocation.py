"""Pruning per layer, read from the method reports of records, as heat maps.

A method's `layers` are read (see `bench.method.LayerReport`). The rest of its report has no fixed
schema; the parts that are read have the forms of the models below. A method may use the same keys
for something else, so parts of another form are not drawn.

Shapes: L layers, E experts, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, NonNegativeFloat, ValidationError

from bench.errors import UserError
from bench.method import LayerReport
from bench.records import AppliedMethod, Record
from bench.records.leaves import JsonObject
from bench.reporting.plots.style import HEATMAP
from bench.reporting.statistics import Floats


@dataclass(frozen=True)
class AllocationGrid:
    """A matrix of numbers for a heat map; unknown ones are NaN.

    `scale_top` is the value with the lightest colour, None for the largest value in the matrix.
    """

    title: str
    quantity: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    row_name: str = "layer"
    column_name: str = "layer"
    scale_top: float | None = 1.0


def allocation_grids(records: Sequence[Record]) -> list[AllocationGrid]:
    """Return all heat maps: grids of single runs, then profiles with one row per run."""
    found = [grid for record in records for grid in _run_grids(record)]
    return [*found, *_layer_profiles(records)]


def _run_grids(record: Record) -> Iterator[AllocationGrid]:
    """Yield the grids of a single run, whose rows are layers."""
    for method in record.methods:
        title = f"{record.model.name}, {record.label}"
        yield from _expert_grids(title, method)
        yield from _head_grids(title, method)


def _expert_grids(title: str, method: AppliedMethod) -> Iterator[AllocationGrid]:
    """Yield the kept fraction of each expert's micro-experts, and each expert's share of energy."""
    layers = [layer for layer in method.layers if _has_per_expert(layer, "width", "removed")]
    # Columns are experts, so layers with different ones cannot share a grid.
    if not layers or len({tuple(layer.experts or ()) for layer in layers}) > 1:
        return
    rows = tuple(str(layer.layer) for layer in layers)
    columns = tuple(str(expert) for expert in layers[0].experts or ())
    width_LE = np.array([layer.width_per_expert for layer in layers], dtype=float)
    gone_LE = np.array([layer.removed_per_expert for layer in layers], dtype=float)
    # An expert that an earlier method emptied has width 0. With NaN its cell is blank, while 0
    # would look as if this method had pruned it.
    kept_LE = np.divide(
        width_LE - gone_LE, width_LE, out=np.full_like(width_LE, np.nan), where=width_LE > 0
    )
    yield AllocationGrid(title, "micro-experts kept", rows, columns, kept_LE, column_name="expert")
    if all(_has_per_expert(layer, "energy") for layer in layers):
        energy_LE = np.array([layer.energy_per_expert for layer in layers], dtype=float)
        # The lower bound avoids 0/0 for a layer that no calibration token reached.
        share_LE = energy_LE / np.maximum(energy_LE.sum(axis=1, keepdims=True), 1e-300)
        yield AllocationGrid(
            title, "share of the layer's energy", rows, columns, share_LE,
            column_name="expert", scale_top=None,
        )  # fmt: skip


def _has_per_expert(layer: LayerReport, *quantities: str) -> bool:
    """Return whether a layer reports one number per expert of each quantity."""
    count = len(layer.experts or ())
    lists = (getattr(layer, f"{quantity}_per_expert") for quantity in quantities)
    return count > 0 and all(each is not None and len(each) == count for each in lists)


Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Shape(BaseModel):
    """Sizes of a decoder: its heads, and the neurons of each layer."""

    heads: Count
    widths: list[NonNegativeFloat] = Field(default_factory=list)


class _Heads(BaseModel):
    """The heads that each layer keeps, by number."""

    heads: list[list[Index]] = Field(min_length=1)


class _HeadPruning(BaseModel):
    """The same in the report of a method that combines several strategies."""

    head_pruning: _Heads


class _Shaped(BaseModel):
    """A report with the decoder's sizes."""

    shape: _Shape


class _LayerWork(BaseModel):
    """Heads and neurons that compute visual tokens in one layer."""

    heads: NonNegativeFloat
    neurons: NonNegativeFloat


class _Work(_Shaped):
    """Work for visual tokens by layer."""

    work: list[_LayerWork] = Field(min_length=1)


class _Groups(BaseModel):
    """Groups by layer, before and after."""

    groups_by_layer: dict[str, Count] = Field(min_length=1)
    kept_by_layer: dict[str, Index]


Form = TypeVar("Form", bound=BaseModel)


def _part_of(report: JsonObject, form: type[Form]) -> Form | None:
    """Return the part of a report that has a form, None if it has none."""
    try:
        return form.model_validate(report)
    except ValidationError:
        return None


def _head_grids(title: str, method: AppliedMethod) -> Iterator[AllocationGrid]:
    """Yield the heads that still attend to the image."""
    shaped, nested = _part_of(method.report, _Shaped), _part_of(method.report, _HeadPruning)
    # A budget search also reports `heads`, but as a total number instead of lists per layer.
    found = _part_of(method.report, _Heads) or (nested.head_pruning if nested else None)
    if shaped is None or found is None:
        return
    count = shaped.shape.heads
    if any(head >= count for heads in found.heads for head in heads):
        return
    kept_LH = np.zeros((len(found.heads), count))
    for layer, heads in enumerate(found.heads):
        kept_LH[layer, heads] = 1
    rows, columns = _index_labels(len(found.heads)), _index_labels(count)
    yield AllocationGrid(
        title, "heads kept for visual tokens", rows, columns, kept_LH, column_name="head"
    )


def _layer_profiles(records: Sequence[Record]) -> Iterator[AllocationGrid]:
    """Yield one grid per quantity and model, with one row per run."""
    lines: dict[tuple[str, str, tuple[str, ...]], dict[str, list[float]]] = defaultdict(dict)
    for record in records:
        for method in record.methods:
            for quantity, by_layer in _layer_quantities(method).items():
                # The key includes the layers, because rows of a grid need the same columns, and
                # methods may report different layers.
                key = (record.model.name, quantity, tuple(by_layer))
                row = f"{record.label} ({record.id[:8]})"
                lines[key][row] = list(by_layer.values())
    for (model, quantity, columns), rows in lines.items():
        # All shares have the same scale; bits have no natural maximum.
        top = None if quantity == BITS_PER_WEIGHT else 1.0
        values = np.array(list(rows.values()), dtype=float)
        names = tuple(rows)
        yield AllocationGrid(model, quantity, names, columns, values, row_name="", scale_top=top)


BITS_PER_WEIGHT = "bits per weight"


def _layer_quantities(method: AppliedMethod) -> dict[str, dict[str, float]]:
    """Return every quantity that a method reports as one number per layer."""
    found = dict[str, dict[str, float]]()
    groups, work = _part_of(method.report, _Groups), _part_of(method.report, _Work)
    if groups is not None and groups.kept_by_layer.keys() >= groups.groups_by_layer.keys():
        kept, whole = groups.kept_by_layer, groups.groups_by_layer
        found["groups alive"] = {name: kept[name] / whole[name] for name in whole}
    bits = {str(e.layer): e.mean_bits for e in method.layers if e.mean_bits is not None}
    if bits:
        found[BITS_PER_WEIGHT] = bits
    if work is not None and len(work.work) == len(work.shape.widths):
        layers, shape = work.work, work.shape
        shares = {
            "heads": [layer.heads / shape.heads for layer in layers],
            # A layer whose neurons an earlier method removed has no share.
            "neurons": [
                layer.neurons / width if width else np.nan
                for layer, width in zip(layers, shape.widths, strict=True)
            ],
        }
        for name, share in shares.items():
            found[f"{name} for visual tokens"] = dict(
                zip(_index_labels(len(layers)), share, strict=True)
            )
    return found


def _index_labels(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


ROW_HEIGHT, FRAME_HEIGHT = 0.3, 0.95
"""Inches: height of a row, and of everything around the rows."""
FIGURE_WIDTH = 7.0
MAX_ANNOTATED_COLUMNS = 24
"""Maximum number of columns for which cells contain numbers."""
MAX_HEATMAPS = 16


def draw_allocation(grids: Sequence[AllocationGrid]) -> Figure:
    """Draw grids below each other, each with its own scale; lighter is more, even in greyscale.

    Raises:
        UserError: there are more grids than fit on a page.
    """
    if len(grids) > MAX_HEATMAPS:
        raise UserError(
            f"at most {MAX_HEATMAPS} heat maps per page, got {len(grids)}: select fewer runs"
        )
    # All maps have the same row height, whatever their numbers of layers.
    heights = [len(grid.rows) * ROW_HEIGHT + FRAME_HEIGHT for grid in grids]
    figure = Figure(figsize=(FIGURE_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)
    for each, grid in zip(axes[:, 0], grids, strict=True):
        _draw_heatmap(figure, each, grid)
    return figure


def _draw_heatmap(figure: Figure, axes: Axes, grid: AllocationGrid) -> None:
    axes.grid(visible=False)
    top = grid.scale_top if grid.scale_top is not None else float(np.nanmax(grid.values))
    image = axes.imshow(grid.values, cmap=HEATMAP, vmin=0, vmax=top or 1, aspect="auto")
    axes.set_title(f"{grid.quantity}: {grid.title}", loc="left")
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.set_ylabel(grid.row_name)
    axes.set_xlabel(grid.column_name)
    long = max(map(len, grid.columns)) > 6
    if len(grid.columns) <= MAX_ANNOTATED_COLUMNS:
        axes.set_xticks(range(len(grid.columns)), grid.columns, fontsize="x-small")
        if long:
            axes.tick_params(axis="x", labelrotation=15)
        _annotate_cells(axes, grid, top)
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12)


def _annotate_cells(axes: Axes, grid: AllocationGrid, top: float) -> None:
    for (row, column), value in np.ndenumerate(grid.values):
        if not np.isnan(value):
            # The upper part of cividis is too light for white text, the lower part too dark for
            # black.
            ink = "black" if value > 0.55 * top else "white"
            text = f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.3g}"
            axes.text(
                column, row, text if value else "0",
                ha="center", va="center", color=ink, fontsize="x-small",
            )  # fmt: skip
