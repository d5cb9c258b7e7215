"""slimbench: what does a compression method really cost and really save?

>>> import bench
>>> records = bench.run(["model=micro_moe", "method=camera_p"])
>>> frame = bench.records.load()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The function takes the place of the module of the same name: `bench.run(...)` calls it, and
# `from bench.run import ...` still finds the module.
from bench.run import run

if TYPE_CHECKING:
    from bench import records

__all__ = ["records", "run"]


def __getattr__(name: str) -> Any:
    """Import `bench.records` when it is first asked for, since pandas and pydantic take a while."""
    if name == "records":
        import importlib

        return importlib.import_module("bench.records")
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
