"""Families of runs: the same methods, differing only in the amount of compression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.errors import UserError
from bench.records import MethodPart, Record

AMOUNTS = frozenset({"ratio", "keep", "k", "average", "budget", "bits", "threshold", "layers"})
"""Knobs for the amount of compression; along them a family is one line."""


def families(records: Sequence[Record], along: str = "ratio") -> dict[str, str]:
    """Return each run's family by run id: its methods, and the knobs in which families differ.

    `along` names one more knob that does not separate families.
    """
    # Knobs are compared among runs of the same methods only, and a name mentions just those that
    # differ: with every knob in it, a legend would be unreadable.
    alike: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        alike[tuple(method.name for method in record.methods)].append(record)
    named = {}
    for group in alike.values():
        knobs = [_knobs(record, along.rpartition(".")[2]) for record in group]
        differing = [key for key in knobs[0] if any(k.get(key) != knobs[0][key] for k in knobs)]
        for record, own in zip(group, knobs, strict=True):
            told = "".join(f", {name[-1]}={own.get(name)}" for name in differing)
            named[record.id] = (" + ".join(m.name for m in record.methods) or "dense") + told
    return named


def _knobs(record: Record, along: str) -> dict[tuple[str, ...], Any]:
    """Return every knob of every method that is not an amount."""
    skipped = AMOUNTS | {along}
    return {
        (method.name, key): value
        for method in record.methods
        for key, value in method.config.items()
        if key not in skipped
    }


def amount(record: Record, knob: str) -> float | None:
    """Return the value of a knob of the first method that has it.

    A dotted name is a path through methods and config: `camera_p.alpha`, `calibration.rows`. None
    for a dense run, which has no amount, and if the knob is missing or not a number.
    """
    if not record.methods:
        return None
    if "." in knob:
        value = _follow(record, knob)
    else:
        value = next((m.config[knob] for m in record.methods if knob in m.config), None)
    # Not isinstance: True is an int, and a switch is no amount.
    return float(value) if type(value) in (int, float) else None


def _follow(record: Record, path: str) -> Any:
    found: Any = {**record.config, **{method.name: method.config for method in record.methods}}
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def refuse_without(records: Sequence[Record], knob: str) -> None:
    """Raise unless some run has a numeric value of the knob."""
    if all(amount(record, knob) is None for record in records):
        known = sorted({key for r in records for m in r.methods for key in _numbers(m)})
        raise UserError(
            f"--knob {knob}: no run has a numeric value of it; numeric knobs of these methods: "
            f"{', '.join(known) or 'none'}"
        )


def _numbers(method: MethodPart) -> list[str]:
    return [key for key, value in method.config.items() if type(value) in (int, float)]
