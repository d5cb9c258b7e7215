"""Per-layer pruning allocation, read from the method reports of records.

A method's report has no fixed schema; the keys read here are `layers[].{layer, experts,
width_per_expert, removed_per_expert, energy_per_expert, mean_bits}`, `heads` with `shape.heads`,
`work` with `shape`, and `kept_by_layer` with `groups_by_layer`.

Shapes: L layers, E experts, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.records import MethodPart, Record
from bench.reporting.statistics.resampling import Floats


@dataclass(frozen=True)
class Grid:
    """A matrix of numbers for a heat map; unknown ones are NaN. `most` is the top of the scale."""

    title: str
    quantity: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    row_name: str = "layer"
    column_name: str = "layer"
    most: float | None = 1.0


def grids(records: Sequence[Record]) -> list[Grid]:
    """Return all heat maps: grids of single runs, then profiles with one row per run."""
    found = [grid for record in records for grid in _of_one(record)]
    return [*found, *_profiles(records)]


def _of_one(record: Record) -> Iterator[Grid]:
    """Yield the grids of a run whose rows are layers."""
    for method in record.methods:
        title = f"{record.model.name}, {record.label}"
        yield from _experts(title, method)
        yield from _heads(title, method)


def _experts(title: str, method: MethodPart) -> Iterator[Grid]:
    """Yield the kept fraction of each expert's micro-experts, and each expert's share of energy."""
    layers = [layer for layer in _layers(method) if "width_per_expert" in layer]
    # Columns are experts: layers that list different ones cannot share a grid.
    if not layers or len({tuple(layer["experts"]) for layer in layers}) > 1:
        return
    rows = tuple(str(layer["layer"]) for layer in layers)
    columns = tuple(str(expert) for expert in layers[0]["experts"])
    width_LE = np.array([layer["width_per_expert"] for layer in layers], dtype=float)
    gone_LE = np.array([layer["removed_per_expert"] for layer in layers], dtype=float)
    # An expert that an earlier method emptied has width 0: NaN leaves its cell blank, while 0 would
    # read as pruned by this method.
    kept_LE = np.divide(
        width_LE - gone_LE, width_LE, out=np.full_like(width_LE, np.nan), where=width_LE > 0
    )
    yield Grid(title, "micro-experts kept", rows, columns, kept_LE, column_name="expert")
    if all("energy_per_expert" in layer for layer in layers):
        energy_LE = np.array([layer["energy_per_expert"] for layer in layers], dtype=float)
        # The bound avoids 0/0 in a layer that calibration never reached.
        share_LE = energy_LE / np.maximum(energy_LE.sum(axis=1, keepdims=True), 1e-300)
        yield Grid(
            title, "share of the layer's energy", rows, columns, share_LE,
            column_name="expert", most=None,
        )  # fmt: skip


def _heads(title: str, method: MethodPart) -> Iterator[Grid]:
    """Yield the heads that still attend to the image."""
    report = method.report
    # A budget search reports `heads` too, as their total number and not as lists by layer.
    kept = report.get("heads") or report.get("head_pruning", {}).get("heads")
    count = report.get("shape", {}).get("heads")
    if not kept or not count or not isinstance(kept[0], list):
        return
    kept_LH = np.zeros((len(kept), count))
    for layer, heads in enumerate(kept):
        kept_LH[layer, heads] = 1
    rows, columns = _numbers(len(kept)), _numbers(count)
    yield Grid(title, "heads kept for visual tokens", rows, columns, kept_LH, column_name="head")


def _profiles(records: Sequence[Record]) -> Iterator[Grid]:
    """Yield one grid per quantity and model, with one row per run."""
    lines: dict[tuple[str, str, tuple[str, ...]], dict[str, list[float]]] = defaultdict(dict)
    for record in records:
        for method in record.methods:
            for quantity, by_layer in _by_layer(method).items():
                # The layers are part of the key: rows of a grid must have the same columns, and
                # methods may report different subsets of layers.
                key = (record.model.name, quantity, tuple(by_layer))
                row = f"{record.label} ({record.id[:8]})"
                lines[key][row] = list(by_layer.values())
    for (model, quantity, columns), rows in lines.items():
        most = None if quantity == BITS else 1.0
        values = np.array(list(rows.values()), dtype=float)
        yield Grid(model, quantity, tuple(rows), columns, values, row_name="", most=most)


BITS = "bits per weight"


def _by_layer(method: MethodPart) -> dict[str, dict[str, float]]:
    """Return every quantity that a method reports as one number per layer."""
    report, found = method.report, dict[str, dict[str, float]]()
    if report.get("groups_by_layer"):
        groups, kept = report["groups_by_layer"], report["kept_by_layer"]
        found["groups alive"] = {name: kept[name] / groups[name] for name in groups}
    bits = {str(e["layer"]): e["mean_bits"] for e in _layers(method) if "mean_bits" in e}
    if bits:
        found[BITS] = bits
    if report.get("work") and report.get("shape"):
        shape, work = report["shape"], report["work"]
        for name, whole in (("heads", [shape["heads"]] * len(work)), ("neurons", shape["widths"])):
            share = [layer[name] / width for layer, width in zip(work, whole, strict=True)]
            found[f"{name} for visual tokens"] = dict(zip(_numbers(len(work)), share, strict=True))
    return found


def _layers(method: MethodPart) -> list[dict[str, Any]]:
    """Return the report of each layer; some methods store a plain number under `layers`."""
    layers = method.report.get("layers")
    return [e for e in layers if isinstance(e, dict)] if isinstance(layers, list) else []


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))
