"""The rows of all records in one Parquet file, so that thousands of them are a data frame at once.

It is a copy that can be removed at any time. A row is used only while its record's file is the
very one it was made from (same inode, size and time of change) and was read by a program of the
same schema; what is new or changed is read from its record, and the copy is written again if the
folder lets us.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.record import SCHEMA, Record
from bench.records.store import RECORD, Store

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.parquet"


def table(store: Store) -> pa.Table:
    """Return one row per metric and per cost of every readable record, oldest record first."""
    import pyarrow as pa
    import pyarrow.compute as pc

    stamps = _stamps(store)
    kept = _read(store.root / INDEX)
    pairs = kept.group_by(["run", "stamp"]).aggregate([]).to_pylist()
    valid = {pair["run"] for pair in pairs if stamps.get(pair["run"]) == pair["stamp"]}
    fresh = {run: store.find(run) for run in stamps.keys() - valid}
    rows = [row for run, record in fresh.items() if record for row in _rows(record, stamps[run])]
    if not rows and len(valid) == len(pairs):
        return kept
    current = kept.filter(pc.is_in(kept["run"], value_set=pa.array(sorted(valid), pa.string())))
    merged = _sorted(pa.concat_tables([current, pa.Table.from_pylist(rows, kept.schema)]))
    _write(store.root / INDEX, merged)
    return merged


def _stamps(store: Store) -> dict[str, str]:
    """Return what tells the file of each record from any other that was or will be there."""
    stamps = {}
    for run in store.ids():
        try:
            state = (store.folder(run) / RECORD).stat()
        except OSError:
            continue
        stamps[run] = f"{SCHEMA}.{state.st_ino}.{state.st_size}.{state.st_mtime_ns}"
    return stamps


def _schema() -> pa.Schema:
    """Return the columns: those of the record, then those of metrics, then those of costs."""
    import pyarrow as pa

    text, number, whole, truth = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    columns = dict.fromkeys(
        ("run", "started", "group", "model", "label", "methods", "saving"), text
    )
    columns |= {"ratio": number, "kind": text}
    columns |= dict.fromkeys(("benchmark", "task", "metric", "filter"), text)
    columns |= {"shots": whole, "split": text, "value": number, "stderr": number, "n": whole}
    columns |= {"higher_is_better": truth, "headline": truth, "task_version": text}
    columns |= dict.fromkeys(("scope", "quantity", "unit", "how", "stamp"), text)
    return pa.schema(columns)


def _read(path: Path) -> pa.Table:
    """Return the copy; none, or one that is damaged or of another program, is an empty one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return _schema().empty_table()
    return found if found.schema.equals(_schema()) else _schema().empty_table()


def _write(path: Path, rows: pa.Table) -> None:
    """Write the copy, whole or not at all; a folder that cannot be written goes without."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bench.records import atomic

    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    try:
        atomic.write_bytes(path, sink.getvalue().to_pybytes())
    except OSError:
        return


def _sorted(rows: pa.Table) -> pa.Table:
    """Bring records into the order in which they began; within one its rows keep their order."""
    import numpy as np

    begun = rows["started"].to_numpy(zero_copy_only=False).astype(str)
    return rows.take(np.lexsort((rows["run"].to_numpy(zero_copy_only=False).astype(str), begun)))


def _rows(record: Record, stamp: str) -> list[dict[str, Any]]:
    described = {
        "run": record.id,
        "started": record.started,
        "group": record.group,
        "model": record.model.name,
        "label": record.label,
        "methods": _joined([method.name for method in record.methods]) or "dense",
        "saving": _joined([method.saving for method in record.methods]) or "none",
        "ratio": next((m.config["ratio"] for m in record.methods if "ratio" in m.config), None),
        "stamp": stamp,
    }
    metrics = [{"kind": "metric", **m.model_dump()} for m in record.metrics]
    costs = [{"kind": "cost", **c.model_dump(exclude={"parts"})} for c in record.costs]
    return [{**described, **row} for row in (*metrics, *costs)]


def _joined(names: Sequence[str]) -> str:
    return "+".join(names)
