"""Records of older programs are read as this program would have written them."""

import json
from pathlib import Path

from bench.records.record import SCHEMA, Cost, DenseModel, MissingMeasurement, Record, checksum
from bench.records.store import Store, serialize_record

MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)
ID = "a" * 12


def made(costs, gaps):
    return Record(
        id=ID, started="", finished="", group=None, command="", config={}, environment={},
        model=MODEL, methods=(), metrics=(), costs=costs, gaps=gaps, provenance={},
    )  # fmt: skip


def written_as(version, record, folder):
    content = json.loads(serialize_record(record)) | {"schema_version": version}
    del content["checksum"]
    path = Path(folder) / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**content, "checksum": checksum(content)}))


def test_flops_gaps_of_the_first_version_are_gaps(tmp_path):
    store = Store(tmp_path)
    kept = Cost(scope="model", quantity="bytes", unit="B", value=4, how="counted")
    energy = MissingMeasurement(scope="1x8", quantity="energy", reason="no counter")
    old = Cost(
        scope="forward 1x8", quantity="flops_gaps", unit="1", value=2, how="counted",
        parts={"aten.addr": 1.0, "aten.odd_mm": 1.0},
    )  # fmt: skip
    written_as(1, made((kept, old), (energy,)), store.folder(ID))
    record = store.get(ID)
    assert record.schema_version == SCHEMA
    assert record.costs == (kept,)
    assert [(gap.quantity, gap.reason, gap.how) for gap in record.gaps] == [
        ("flops", "aten.addr", "counted"),
        ("flops", "aten.odd_mm", "counted"),
        ("energy", "no counter", None),
    ]
    assert record.gap("flops", "forward 1x8").reason == "aten.addr"


def test_a_record_of_today_is_read_as_it_was_written(tmp_path):
    gap = MissingMeasurement(scope="forward 1x8", quantity="flops", reason="why", how="analytic")
    record = made((), (gap,))
    Store(tmp_path).write(record, [], "")
    assert Store(tmp_path).get(ID) == record
