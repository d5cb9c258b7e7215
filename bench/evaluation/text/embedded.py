"""The embedded world's documents as the data sets that task files ask for."""

from __future__ import annotations

from typing import Any

import datasets

from bench.data.world import documents, fingerprint
from bench.data.world import splits as world_splits
from bench.evaluation.source import Source


def splits(*, world: str, only: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Return the splits of a task of the world; task files name this as their `custom_dataset`.

    `only` names the scored split when no other is wanted: its documents then are all that is
    generated. A task's metadata, which the harness passes along, are ignored.
    """
    rows = {only: documents(world, "test")} if only else world_splits(world)
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    )


def world_source(task: str) -> Source:
    """Describe the embedded documents of a task."""
    return Source("embedded", f"world:{task}", None, fingerprint(task))
