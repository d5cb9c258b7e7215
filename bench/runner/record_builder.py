"""Parts of a record: the dense model, peak memory of methods, provenance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.records import AppliedMethod, Cost, DenseModel

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.models.model import Model
    from bench.runner.inputs import RunInputs


def method_memory_costs(methods: Sequence[AppliedMethod]) -> list[Cost]:
    """Return the peak memory of each method while it was applied."""
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


def describe_dense_model(model: Model) -> DenseModel:
    """Describe a model as it is before any method changes it."""
    from bench.measurement.model_size import count_parameters, stored_bytes

    stored = model.quantization
    return DenseModel(
        name=model.name,
        source=model.config.source,
        revision=model.revision,
        fingerprint=model.fingerprint,
        architecture=model.structure.architecture,
        parameters=stored.parameters if stored else count_parameters(model.network),
        bytes=stored.bytes if stored else stored_bytes(model.network),
    )


def provenance_of(config: RunConfig, inputs: RunInputs) -> dict[str, object]:
    """Return the origin of every input, so that the numbers can be traced."""
    return {
        "data": inputs.benchmark.provenance,
        **inputs.calibration_inputs.fingerprints,
        "seed": config.seed,
        "identity": inputs.identity,
        "git_commit": code_revision(),
    }


def chat_template_of(config: RunConfig, model: Model) -> object:
    """Return the template that prompts were rendered with, None if they are plain text."""
    if config.benchmark.harness == "lm_eval":
        from bench.evaluation.text.chat import select_template

        return select_template(config.benchmark, model.tokenizer, model.name)
    if config.benchmark.harness != "lmms_eval":
        return None
    from bench.data.chat import chat_template

    return chat_template(model.processor)


def config_yaml(config: RunConfig) -> str:
    """Return the config as the YAML file that lies beside a record."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.plain()))


# Once per process: what it imported stays the same whatever is checked out meanwhile.
@functools.cache
def code_revision() -> str | None:
    """Return the commit of the working tree that contains this package, as `git describe` does.

    `-dirty` is added for any change of a tracked file, and for a new file of code. None if the
    package is installed, even into a folder of somebody's repository.
    """
    folder = Path(__file__).parents[2]
    # An installed package lies in no repository, or is not tracked by the one around it.
    if not _git(folder, "ls-files", __file__):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    added = _git(folder, "ls-files", "--others", "--exclude-standard", *_CODE_FOLDERS)
    # Git that answers one question and not the next proves nothing clean.
    return f"{commit}" if (changed, added) == ("", "") else f"{commit}-dirty"


_CODE_FOLDERS = ("bench", "methods", "conf", "hydra_plugins")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git answers; None if there is no git, no repository, or an error."""
    import subprocess

    # Without locks, since a run must not disturb a commit that is made meanwhile.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
