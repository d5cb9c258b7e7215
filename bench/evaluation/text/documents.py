"""Documents of one task: from a user's file, the task's own function, or the hub."""

from __future__ import annotations

from typing import Any

from bench.data import hub
from bench.evaluation import local_files
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.source import Source, hub_source
from bench.evaluation.text import embedded
from bench.evaluation.text.definition import evaluated_split

Splits = dict[str, Any]
"""Data sets by name of split."""


def load(name: str, defined: dict[str, Any], benchmark: BenchmarkConfig) -> tuple[Splits, Source]:
    """Return the splits that the benchmark gives a task, and where they came from."""
    path = benchmark.data.get(name)
    if path:
        return local_files.load(name, path, evaluated_split(defined))
    if benchmark.suite == "micro":
        return _from_function(defined, only=_only(defined)), embedded.world_source(name)
    if "custom_dataset" in defined:
        data = _from_function(defined)
        return data, Source("harness", name, None, content(data))
    return _from_hub(defined)


def _only(defined: dict[str, Any]) -> str | None:
    """Return the single split needed by a task without few-shot examples, else None."""
    return None if defined.get("num_fewshot") else evaluated_split(defined)


def _from_function(defined: dict[str, Any], **options: Any) -> Splits:
    given = {**(defined.get("metadata") or {}), **(defined.get("dataset_kwargs") or {})}
    data: Splits = defined["custom_dataset"](**given, **options)
    return data


def _from_hub(defined: dict[str, Any]) -> tuple[Splits, Source]:
    options = dict(defined.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)  # `datasets` rejects it by now
    location = (defined["dataset_path"], defined.get("dataset_name"))
    data = hub.load(*location, **options)
    return data, hub_source(hub.spell(*location), hub.commit_of(data), content(data))


def content(data: Splits) -> str:
    """Return the identity of loaded documents."""
    # The library's own hash of how the data came to be. It is there already, whereas hashing the
    # rows could mean reading gigabytes.
    return "-".join(
        str(getattr(split, "_fingerprint", name)) for name, split in sorted(data.items())
    )
