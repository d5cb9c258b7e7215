"""Ten thousand records as a data frame: with the index, after one more record, and without it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.records import AppliedMethod, Cost, DenseModel, Metric, Record, load
from bench.records.index import INDEX
from bench.records.record_file import serialize_record
from bench.records.store import RECORD
from tests.performance.figure import Figure

COUNT = 10_000
TASKS = ("boolq", "openbookqa", "rte", "arc_easy", "winogrande", "hellaswag", "piqa", "mathqa")
QUANTITIES = ("parameters", "nonzero parameters", "active parameters", "bytes", "flops", "macs")


def figures() -> list[Figure]:
    """Seconds to load and filter, in a process that has pandas and the files in memory."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        for number in range(COUNT):
            _write(results, number)
        first = _seconds(lambda: _filtered(results))
        again = [_seconds(lambda: _filtered(results)) for _ in range(5)]
        _write(results, COUNT)
        one_more = _seconds(lambda: _filtered(results))
        size = (results / INDEX).stat().st_size / 2**20
    usual = statistics.median(again)
    how = f"{COUNT} records, median of 5; index of {size:.1f} MiB"
    return [
        Figure("store load and filter", usual, "< 1.5 s", usual < 1.5, how),
        Figure("store with one new record", one_more, "< 3 s", one_more < 3, "index written again"),
        Figure("store without index", first, "< 30 s", first < 30, f"reads {COUNT} record files"),
    ]


def _filtered(results: Path) -> int:
    """Ask what a user asks: one task's headline metric of one method, best first."""
    frame = load(results)
    chosen = frame[(frame.task == "piqa") & frame.headline.eq(True) & (frame.ratio > 0.3)]
    found = chosen.sort_values("value", ascending=False)
    assert len(found) >= COUNT * 3 // 5
    return len(found)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _write(results: Path, number: int) -> None:
    """Write a record file like those of a sweep; without the flush that 10,000 would wait for."""
    record = _record(number)
    folder = results / "runs" / record.id
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(serialize_record(record))


def _record(number: int) -> Record:
    ratio = number % 10 / 10
    method = AppliedMethod(
        name="camera_p", config={"ratio": ratio}, effect="removed", report={}, seconds=1.0
    )
    metrics = tuple(
        Metric(
            benchmark="camera_micro", task=task, metric=metric, filter="none", shots=0,
            split="test", value=number % 997 / 997, stderr=0.02, n=400, higher_is_better=True,
            headline=metric == "acc",
        )
        for task in TASKS for metric in ("acc", "acc_norm")
    )  # fmt: skip
    costs = tuple(
        Cost(scope="model", quantity=quantity, unit="1", value=number, how="counted")
        for quantity in QUANTITIES
    )
    return Record(
        id=f"{number:012x}", started=f"2026-01-01T{number:08d}", finished="2026-01-02",
        sweep="sweep", command="bench run", environment={},
        config={"benchmark": {"name": "camera_micro"}},
        model=DenseModel(
            name="micro_moe", source="embedded:micro_moe", revision=None, fingerprint="f" * 64,
            architecture="Qwen2MoeForCausalLM", parameters=2_310_000, bytes=9_240_000,
        ),
        methods=(method,), metrics=metrics, costs=costs, provenance={},
    )  # fmt: skip
