"""Rows of `bench ls`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.records import Record


def configs(group: str) -> list[dict[str, Any]]:
    """Return the shipped and third-party configs of a group with their first comment line."""
    # Hydra takes long to import and only this listing needs it.
    from bench.compose import options

    return [{group: name, "about": _about(group, name)} for name in options(group)]


def runs(results_dir: Path) -> list[dict[str, Any]]:
    """Return one row per record, oldest first, then one per unreadable record with the reason."""
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
    """Return the benchmark's name, or None if the record's config is damaged."""
    benchmark = record.config.get("benchmark")
    return benchmark.get("name") if isinstance(benchmark, dict) else None


def _about(group: str, name: str) -> str:
    """Return the first comment of a config file, which describes it."""
    import importlib.resources

    file = importlib.resources.files("conf") / group / f"{name}.yaml"
    if not file.is_file():
        return ""
    comments = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    # Hydra reads `# @package ...` in the first line; it is a directive and no description.
    said = [line for line in comments if not line.startswith("# @package")]
    return said[0].removeprefix("# ") if said else ""
