"""Index of all records as one Parquet file, so that thousands of them load as one data frame.

The index is a cache and can be deleted at any time. A row is used only if the file of its record
has not changed (inode, size and modification time) and the code that converts records to rows is
the same. New or changed records are read from their files, and the index is rewritten if the folder
is writable.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.records.files import SAMPLE_COLUMNS, read_table, reason_of
from bench.records.record import JsonObject, Record, standing_effects
from bench.records.store import RECORD, RUN_METADATA, SAMPLES, Store

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

INDEX = "index.parquet"
UNREADABLE = "unreadable"


def index_table(store: Store) -> pa.Table:
    """Return one row per metric and per cost of every readable record, oldest record first."""
    stamps = _record_stamps(store)
    indexed = _read_index(store.root / INDEX)
    # Python lists, because functions of pyarrow import pandas, which would take a third of the time
    # of `bench ls`.
    pairs = set(zip(indexed["run"].to_pylist(), indexed["stamp"].to_pylist(), strict=True))
    valid = {run for run, stamp in pairs if stamps.get(run) == stamp}
    fresh = {run: store.find(run) for run in stamps.keys() - valid}
    rows: list[JsonObject] = []
    for run, record in fresh.items():
        # An unreadable record gets a row as well, so that its file is not parsed on every call.
        unreadable = [{"run": run, "kind": UNREADABLE, "stamp": stamps[run]}]
        rows += _rows_of_record(record, stamps[run]) if record else unreadable
    # The second condition detects deleted records, whose rows must be removed from the index.
    if rows or len(valid) < len(pairs):
        import pyarrow as pa
        import pyarrow.compute as pc

        known = pa.array(sorted(valid), pa.string())
        current = indexed.filter(pc.is_in(indexed["run"], value_set=known))
        added = pa.Table.from_pylist(rows, indexed.schema)
        indexed = _sorted_by_start(pa.concat_tables([current, added]))
        _write_index(store.root / INDEX, indexed)
    if UNREADABLE not in indexed["kind"].to_pylist():
        return indexed
    # Imported here, because it takes as long as reading the index.
    import pyarrow.compute as pc

    return indexed.filter(pc.not_equal(indexed["kind"], UNREADABLE))


def _record_stamps(store: Store) -> dict[str, str]:
    """Return a stamp per run that identifies the current file of its record."""
    # A record is replaced by renaming a new file, which may have the same size and time, but never
    # the same inode.
    stamps, code = {}, _code()
    for run in store.ids():
        try:
            state = (store.folder(run) / RECORD).lstat()
        except OSError:  # Removed since the listing, or a folder without a record.
            continue
        stamps[run] = f"{code}.{state.st_ino}.{state.st_size}.{state.st_mtime_ns}"
    return stamps


@functools.cache
def _code() -> str:
    """Return a hash of the modules that determine the content of rows, such as labels of runs."""
    here = Path(__file__)
    sources = here.read_bytes() + here.with_name("record.py").read_bytes()
    return hashlib.sha256(sources).hexdigest()[:16]


def _schema() -> pa.Schema:
    """Return the columns: those of the record, of metrics, and of costs, in this order."""
    import pyarrow as pa

    text, number, whole, truth = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    columns = dict.fromkeys(
        ("run", "started", "sweep", "model", "label", "methods", "effect"), text
    )
    columns |= {"ratio": number, "marks": text, "kind": text}
    columns |= dict.fromkeys(("benchmark", "task", "metric", "filter"), text)
    columns |= {"shots": whole, "split": text, "value": number, "stderr": number, "n": whole}
    columns |= {"higher_is_better": truth, "headline": truth, "task_version": text}
    columns |= dict.fromkeys(("scope", "quantity", "unit", "how", "stamp"), text)
    return pa.schema(columns)


def _read_index(path: Path) -> pa.Table:
    """Read the index; return an empty table if it is missing, corrupt, or has another schema."""
    try:
        found = read_table(path, {})
    except (OSError, ValueError):
        return _schema().empty_table()
    return found if found.schema.equals(_schema()) else _schema().empty_table()


def _write_index(path: Path, rows: pa.Table) -> None:
    """Write the index atomically; do nothing if the folder is not writable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bench.records import files

    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    try:
        files.write_bytes(path, sink.getvalue().to_pybytes())
    except OSError:
        return


def _sorted_by_start(rows: pa.Table) -> pa.Table:
    """Sort records by start time; the rows of a record keep their order."""
    import numpy as np

    # np.lexsort is stable, and its last key is the primary one. Equal times are ordered by run, so
    # that rows of two records are not mixed.
    begun = rows["started"].to_numpy(zero_copy_only=False).astype(str)
    return rows.take(np.lexsort((rows["run"].to_numpy(zero_copy_only=False).astype(str), begun)))


def _rows_of_record(record: Record, stamp: str) -> list[JsonObject]:
    described = {
        "run": record.id,
        "started": record.started,
        "sweep": record.sweep,
        "model": record.model.name,
        "label": record.label,
        "methods": methods_name(method.name for method in record.methods),
        "effect": _join_names(standing_effects(record.methods)) or "none",
        "ratio": next((m.config["ratio"] for m in record.methods if "ratio" in m.config), None),
        "marks": ", ".join(record.marks),
        "stamp": stamp,
    }
    metrics = [{"kind": "metric", **m.model_dump()} for m in record.metrics]
    costs = [{"kind": "cost", **c.model_dump(exclude={"parts"})} for c in record.costs]
    return [{**described, **row} for row in (*metrics, *costs)]


def methods_name(names: Iterable[str]) -> str:
    """Return the name of methods in the column `methods`: joined by `+`, `dense` without any."""
    return _join_names(names) or "dense"


def _join_names(names: Iterable[str]) -> str:
    return "+".join(names)


def load(results_dir: str | Path = "results") -> pd.DataFrame:
    """Return all records of a results folder as one data frame in long format.

    There is one row per metric (`kind == "metric"`) and per cost (`kind == "cost"`); the columns
    that describe the run (`run`, `model`, `label`, `methods`, `effect`, `started`, `sweep`) repeat.
    Unreadable records are left out; `bench ls runs` names them.
    """
    from bench.device.devices import generators_restored

    with generators_restored():
        # The stamp is internal to the index.
        table = index_table(Store(Path(results_dir))).drop_columns(["stamp"])
        frame: pd.DataFrame = table.to_pandas()
    return frame


def samples_table(path: Path) -> pa.Table:
    """Return the samples in a file; raises as `read_table` does."""
    table = read_table(path, SAMPLE_COLUMNS)
    # Files written before the id was stored, or by other programs, have none.
    run = (table.schema.metadata or {}).get(RUN_METADATA.encode(), b"").decode("utf8", "replace")
    if run and run != path.parent.name:
        raise ValueError(f"it holds the samples of run {run[:40]!r}")
    if table.num_rows and not {"task", "doc_id"} <= set(table.column_names):
        raise ValueError("it has no columns `task` and `doc_id`")
    for name in {"task", "doc_id", "choices", "loglikelihoods"} & set(table.column_names):
        # A sample without choices has an empty list of them.
        if table[name].null_count:
            raise ValueError(f"its column {name!r} has empty places")
    return table


def samples(run: str, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return the scored samples of one run, one row per sample; `run` may be a prefix of its id.

    Raises:
        UserError: there is no such run, the prefix is ambiguous, or the samples are damaged.
    """
    from bench.device.devices import generators_restored

    store = Store(Path(results_dir))
    path = store.folder(store.get(run).id) / SAMPLES
    try:
        with generators_restored():
            frame: pd.DataFrame = samples_table(path).to_pandas()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {reason_of(error)}; repeat the run: bench run ... force=true"
        ) from None
    return frame
