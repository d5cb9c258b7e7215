"""From results to a Record; provenance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runner.inputs import RunInputs, _plain_config

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.models.model import Model
    from bench.records import AppliedMethod, Cost, DenseModel


def _method_memory_costs(methods: Sequence[AppliedMethod]) -> list[Cost]:
    """Return the peak memory of each method while it was applied."""
    from bench.records import Cost

    return [
        Cost(
            scope=f"phase applying {method.name}",
            quantity="peak_bytes",
            unit="B",
            value=method.peak_bytes,
            how="measured",
        )
        for method in methods
        if method.peak_bytes is not None
    ]


def _dense_model(model: Model, costs: Sequence[Cost]) -> DenseModel:
    """Describe the model as it was before any method changed it."""
    from bench.records import DenseModel

    counted = {cost.quantity: cost.value for cost in costs}
    return DenseModel(
        name=model.name,
        source=model.config.source,
        revision=model.revision,
        fingerprint=model.fingerprint,
        architecture=model.structure.architecture,
        parameters=int(counted["parameters"]),
        bytes=int(counted["bytes"]),
    )


def _provenance(config: RunConfig, inputs: RunInputs) -> dict[str, Any]:
    """Return the origin of every input, so that the numbers can be traced."""
    return {
        "data": inputs.plan.provenance,
        **inputs.loan.fingerprints,
        "seed": config.seed,
        "git_commit": _git_commit(),
    }


def _config_yaml(config: RunConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_plain_config(config)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the working tree that contains this package, None if installed."""
    import subprocess

    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
