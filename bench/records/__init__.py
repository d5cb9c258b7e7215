"""Run records, their store, and queries as pandas data frames."""

from bench.records.query import load, samples
from bench.records.record import (
    CostPart,
    GapPart,
    MethodPart,
    MetricPart,
    ModelPart,
    Record,
    run_id,
    unreal,
)
from bench.records.store import Store

__all__ = [
    "CostPart",
    "GapPart",
    "MethodPart",
    "MetricPart",
    "ModelPart",
    "Record",
    "Store",
    "load",
    "run_id",
    "samples",
    "unreal",
]
