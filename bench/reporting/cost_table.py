"""Table of measured costs of one run, with one row per stage and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.measurement.quantities import STAGES
from bench.ui import console, format_quantity, terminal_table

if TYPE_CHECKING:
    from bench.records import Cost
    from bench.records.record import Record

MARK = " *"
MODEL_SIZES = {"bytes": "weights in memory", "disk_bytes": "on disk"}
DEVICE_RATES = {"matrix_rate": ("matrix product", "FLOP/s"), "copy_bandwidth": ("copy", "B/s")}


def print_costs(record: Record) -> None:
    """Print the measured costs of a run, missing ones with reasons, and caveats."""
    scopes = measured_scopes(record)
    out = console()
    if not scopes:
        for line in _missing_lines(record):
            out.print(line, soft_wrap=True)
        return
    threads = record.environment.get("threads")
    title = f"costs of {record.label}: {record.model.name}, run {record.id[:8]}, threads: {threads}"
    # Columns without any value (for instance energy without a meter) are left out, so that the
    # table fits a terminal.
    columns = {
        heading: cell for heading, cell in COLUMNS.items() if _has_values(record, scopes, cell)
    }
    table = terminal_table(columns, title)
    for scope in scopes:
        table.add_row(scope, *(cell(record, scope) for cell in columns.values()))
    out.print(table)
    # soft_wrap, because rich would break the sentences at the console's width.
    for line in (*_size_lines(record), *_note_lines(record), *_missing_lines(record)):
        out.print(line, soft_wrap=True)


def measured_scopes(record: Record) -> list[str]:
    """Return the scopes of measured calls in a record, in order of appearance."""
    # A scope is a stage followed by its shapes (`prefill 1x512`). The trailing space excludes
    # scopes without shapes and stages with a longer name.
    stages = tuple(f"{stage} " for stage in STAGES)
    quantities = ("latency", "peak_bytes", "energy")
    scopes = (c.scope for c in record.costs if c.quantity in quantities)
    return list(dict.fromkeys(scope for scope in scopes if scope.startswith(stages)))


def speedup_text(record: Record, scope: str) -> str:
    """Format a speed-up with its share of the theoretical one: `1.31 (62 %)`."""
    speedup = record.cost("speedup", scope)
    if speedup is None:
        return _missing_reason(record, "speedup", scope)
    share = record.cost("realised_speedup_fraction", scope)
    of_theory = f" ({100 * share.value:.0f} %)" if share else ""
    return f"{speedup.value:.2f}{of_theory}{MARK if speedup.note else ''}"


def format_duration(seconds: float) -> str:
    """Format a time with three significant digits: 31.2 ms."""
    factor, unit = _unit(seconds)
    return f"{seconds / factor:.3g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits a time."""
    return next(((f, u) for f, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= f), (1e-6, "us"))


def _latency(record: Record, scope: str) -> str:
    cost = record.cost("latency", scope)
    if cost is None:
        return "-"
    mark = MARK if cost.note else ""
    return f"{_median_and_range(cost, '')}{mark}"


def _dense(record: Record, scope: str) -> str:
    cost = record.cost("latency", scope)
    return (
        "-" if cost is None or "dense_p50" not in cost.parts else _median_and_range(cost, "dense_")
    )


def _median_and_range(cost: Cost, prefix: str) -> str:
    """Format the median with the 10th and 90th percentiles: 31.2 (30.9 to 33) ms."""
    # The unit suits the median and is used for all three numbers, so that they can be compared.
    factor, unit = _unit(cost.parts[f"{prefix}p50"])
    low, middle, high = (cost.parts[f"{prefix}{name}"] / factor for name in ("p10", "p50", "p90"))
    return f"{middle:.3g} ({low:.3g} to {high:.3g}) {unit}"


def _speedup(record: Record, scope: str) -> str:
    cost = record.cost("speedup", scope)
    if cost is None:
        return _missing_reason(record, "speedup", scope)
    mark = MARK if cost.note else ""
    return f"{cost.value:.3f} ({cost.parts['low']:.3f} to {cost.parts['high']:.3f}){mark}"


def _theory(record: Record, scope: str) -> str:
    cost = record.cost("speedup", scope)
    return "-" if cost is None or "theory" not in cost.parts else f"{cost.parts['theory']:.3f}"


def _realised(record: Record, scope: str) -> str:
    cost = record.cost("realised_speedup_fraction", scope)
    return (
        _missing_reason(record, "realised_speedup_fraction", scope)
        if cost is None
        else f"{100 * cost.value:.0f} %"
    )


def _missing_reason(record: Record, quantity: str, scope: str) -> str:
    gap = record.missing_cost(quantity, scope)
    return gap.reason if gap else "-"


def _roofline_share(record: Record, scope: str) -> str:
    cost = record.cost("roofline_efficiency", scope)
    return "-" if cost is None else f"{100 * cost.value:.0f} %"


def _method_time(record: Record, scope: str) -> str:
    cost = record.cost("method_latency", scope)
    return "-" if cost is None else format_duration(cost.value)


def _peak(record: Record, scope: str) -> str:
    cost = record.cost("peak_bytes", scope)
    return "-" if cost is None else f"{format_quantity(cost.value)}B"


def _energy(record: Record, scope: str) -> str:
    cost = record.cost("energy", scope)
    return "-" if cost is None else f"{cost.value:.3g} J"


CostCell = Callable[["Record", str], str]

# Headings in the order of the table; defined below the functions that it names.
COLUMNS: dict[str, CostCell] = {
    "median (p10 to p90)": _latency,
    "dense": _dense,
    "speed-up (99 %)": _speedup,
    "in theory": _theory,
    "realised_speedup_fraction": _realised,
    "of device limit": _roofline_share,
    "in the method": _method_time,
    "peak memory": _peak,
    "energy": _energy,
}


def _has_values(record: Record, scopes: list[str], cell: CostCell) -> bool:
    return any(cell(record, scope) != "-" for scope in scopes)


def _size_lines(record: Record) -> Iterator[str]:
    """Yield one line about memory and disk, and one about the device's measured peak rates."""
    model = {name: record.cost(key) for key, name in MODEL_SIZES.items()}
    sizes = [f"{name} {format_quantity(cost.value)}B" for name, cost in model.items() if cost]
    per_token = next((c for c in record.costs if c.quantity == "cache_bytes_per_token"), None)
    if per_token:
        sizes.append(f"cache per generated token {format_quantity(per_token.value)}B")
    if sizes:
        yield "; ".join(sizes)
    rates = {key: record.cost(key, "device") for key in DEVICE_RATES}
    rate_texts = [
        f"{DEVICE_RATES[k][0]} {format_quantity(c.value)}{DEVICE_RATES[k][1]}"
        for k, c in rates.items()
        if c
    ]
    if rate_texts:
        yield f"measured peak rates of this device: {'; '.join(rate_texts)}"


def _note_lines(record: Record) -> Iterator[str]:
    """Yield the explanation of each mark once."""
    noted = (c for c in record.costs if c.quantity in ("latency", "speedup"))
    # A cost may have several notes joined by "; ", and most notes apply to several scopes.
    notes = (note for c in noted if c.note for note in c.note.split("; "))
    for note in dict.fromkeys(notes):
        yield f"{MARK.strip()} {note}"


def _missing_lines(record: Record) -> Iterator[str]:
    """Yield one line per reason, with all costs that are missing for it."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for gap in record.missing:
        # The reason of a missing speed-up is in its cell of the table.
        if gap.quantity not in ("speedup", "realised_speedup_fraction"):
            missing = " ".join(filter(None, (gap.how, gap.quantity.replace("_", " "))))
            by_reason.setdefault((missing, gap.reason), []).append(gap.scope)
    for (missing, reason), scopes in by_reason.items():
        yield f"no {missing} for {', '.join(scopes)}: {reason}"
