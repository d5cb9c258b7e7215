"""Run records, their store, and queries as pandas data frames."""

from bench.records.index import load, samples
from bench.records.record import (
    AppliedMethod,
    Cost,
    DenseModel,
    EffectCheck,
    EstimatedPhase,
    Metric,
    MissingMeasurement,
    Record,
    SizeAndWork,
    run_id,
    without_real_saving,
)
from bench.records.store import Store

__all__ = [
    "AppliedMethod",
    "Cost",
    "DenseModel",
    "EffectCheck",
    "EstimatedPhase",
    "Metric",
    "MissingMeasurement",
    "Record",
    "SizeAndWork",
    "Store",
    "load",
    "run_id",
    "samples",
    "without_real_saving",
]
