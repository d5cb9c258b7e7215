"""What a model costs at work, measured beside the dense one, as rows for its record.

Every number that cannot be had is a `Gap` with its reason. A model whose weights were only zeroed
or masked has its times like any other, but a gap where its gain would be.
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
    """Measure all that the config lists, at every shape of its grid that the model can take."""
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
            found.gaps.append(Gap(work.shape, "further cost", "memory ran out"))
        release(model.device)
    return found


def _rows(subject: Subject, work: Workload, config: CostsConfig, best: Limits | None) -> Rows:
    """Yield all rows of one shape."""
    if "latency" in config.measure:
        yield from gains.rows(subject, work, config.timing, best)
    if "memory" in config.measure:
        yield from memory.rows(subject.model, work)
    if "energy" in config.measure:
        yield from energy.rows(subject, work, config.timing.energy_seconds)


def _limits(model: Model) -> Limits | None:
    """Return what the model's device can do at best; None where no memory is left to measure it."""
    try:
        return limits(model.device, _dtype(model), torch.get_num_threads())
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return None


def _limit_rows(best: Limits | None, model: Model) -> Rows:
    """Yield the device's limits, or the gap that they leave."""
    if best is None:
        yield Gap("device", "limits", "memory ran out")
        return
    kind = str(_dtype(model)).removeprefix("torch.")
    yield Cost("device", "matrix_rate", "FLOP/s", best.matrix_rate, "measured", note=kind)
    yield Cost("device", "copy_bandwidth", "B/s", best.bandwidth, "measured")


def _dtype(model: Model) -> torch.dtype:
    return next(model.network.parameters()).dtype
