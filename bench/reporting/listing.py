"""What `bench ls` lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.records import Record


def configs(group: str) -> list[dict[str, Any]]:
    """Return the shipped and third-party configs of one group with their first comment line."""
    from bench.compose import options

    return [{group: name, "about": _about(group, name)} for name in options(group)]


def runs(results_dir: Path) -> list[dict[str, Any]]:
    """Return all records of a results folder, oldest first, with what was left out."""
    from bench.records import Store

    store = Store(results_dir)
    rows = [
        {
            "run": record.id,
            "started": record.started,
            "model": record.model.name,
            "method": record.label,
            "benchmark": _benchmark(record),
            "average": metric.value if (metric := record.metric("average")) else None,
            "note": None,
        }
        for record in store.all()
    ]
    empty = dict.fromkeys(("started", "model", "method", "benchmark", "average"))
    for run_id, reason in store.unreadable.items():
        rows.append({"run": run_id, **empty, "note": f"unreadable: {reason}"})
    return rows


def _benchmark(record: Record) -> str | None:
    """Return the benchmark's name; None where a damaged file has lost it."""
    benchmark = record.config.get("benchmark")
    return benchmark.get("name") if isinstance(benchmark, dict) else None


def _about(group: str, name: str) -> str:
    """Return what the config file says of itself in its first comment."""
    import importlib.resources

    file = importlib.resources.files("conf") / group / f"{name}.yaml"
    if not file.is_file():
        return ""
    comments = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    said = [line for line in comments if not line.startswith("# @package")]
    return said[0].removeprefix("# ") if said else ""
