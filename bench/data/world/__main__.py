"""Write all tasks as parquet files: `python -m bench.data.world DIR`."""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.data.world import SEED, TASKS, splits


def write(folder: Path, seed: int) -> None:
    """Write `folder/<task>/<split>.parquet` for every task and split."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, documents in splits(task, seed).items():
            pq.write_table(pa.Table.from_pylist(documents), folder / task / f"{split}.parquet")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
