"""Measured costs of a model next to its dense baseline, as entries of a record.

A number that cannot be obtained becomes a missing measurement with its reason. A model whose
weights were only zeroed or masked gets its times like any other, but no speed-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.device import release
from bench.device.memory import is_exhausted
from bench.measurement import energy, gains, memory
from bench.measurement.config import CostsConfig
from bench.measurement.cost import Cost
from bench.measurement.gap import Gap
from bench.measurement.limits import Limits, limits
from bench.measurement.rows import Found, Rows
from bench.measurement.subject import Subject
from bench.measurement.workload import Workload, workloads
from bench.progress import SILENT, Progress

if TYPE_CHECKING:
    from bench.models.model import Model


def measure(subject: Subject, config: CostsConfig, progress: Progress = SILENT) -> Found:
    """Measure all that the config lists, at every shape of its grid that fits the model."""
    found, model = Found(), subject.model
    if not config.measure:
        return found
    if "memory" in config.measure:
        disk = memory.disk_bytes(model.network)
        found.costs.append(Cost("model", "disk_bytes", "B", disk, "counted"))
    best = None
    if "limits" in config.measure:
        best = _limits(model)
        found.add(_limit_rows(best, model))
    # Out of memory ends one shape, not the run: smaller shapes of the grid still give numbers, and
    # those of this shape that were yielded before the error are kept.
    for work in workloads(model, config.timing):
        if isinstance(work, Gap):
            found.gaps.append(work)
            continue
        progress.step(doing=f"measuring {work.shape}")
        try:
            found.add(_rows(subject, work, config, best))
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            found.gaps.append(Gap(work.shape, "further cost", "out of memory"))
        # Free cached blocks, so that a shape does not fail for the fragments of the one before.
        release(model.device)
    return found


def _rows(subject: Subject, work: Workload, config: CostsConfig, best: Limits | None) -> Rows:
    if "latency" in config.measure:
        yield from gains.rows(subject, work, config.timing, best)
    if "memory" in config.measure:
        yield from memory.rows(subject.model, work)
    if "energy" in config.measure:
        yield from energy.rows(subject, work, config.timing.energy_seconds)


def _limits(model: Model) -> Limits | None:
    """Return the limits of the model's device, or None if it lacks the memory to measure them."""
    try:
        return limits(model.device, _dtype(model), torch.get_num_threads())
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return None


def _limit_rows(best: Limits | None, model: Model) -> Rows:
    if best is None:
        yield Gap("device", "limits", "out of memory")
        return
    kind = str(_dtype(model)).removeprefix("torch.")
    yield Cost("device", "matrix_rate", "FLOP/s", best.matrix_rate, "measured", note=kind)
    yield Cost("device", "copy_bandwidth", "B/s", best.bandwidth, "measured")


def _dtype(model: Model) -> torch.dtype:
    return next(model.network.parameters()).dtype
