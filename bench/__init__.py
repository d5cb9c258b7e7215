"""slimbench: benchmark model-compression methods.

>>> import bench
>>> records = bench.runner.execute(["model=micro_moe", "method=camera_p"])
>>> frame = bench.records.load()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.runner.execute import run

if TYPE_CHECKING:
    from bench import records

__all__ = ["records", "run"]


def __getattr__(name: str) -> Any:
    """Import `bench.records` on first access, since pandas and pydantic are slow to import."""
    if name == "records":
        import importlib

        return importlib.import_module("bench.records")
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
