"""Documents of the synthetic world, as the data sets that task files ask for."""

from __future__ import annotations

from typing import Any

import datasets

from bench.data.world import documents, fingerprint
from bench.data.world import splits as world_splits
from bench.evaluation.source import Source


def splits(*, world: str, only: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Return the splits of one task of the world; our task files name this as `custom_dataset`.

    `only` restricts the result to the scored split, so that nothing else is generated. Further
    arguments are metadata of the task, which the harness passes along; they are ignored.
    """
    rows = {only: documents(world, "test")} if only else world_splits(world)
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    )


def world_source(task: str) -> Source:
    """Describe the embedded documents of a task."""
    return Source("embedded", f"world:{task}", None, fingerprint(task))
