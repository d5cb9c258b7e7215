"""Records of older schemas are read as the current program would have written them."""

import json

from bench.records.record import SCHEMA, Cost, DenseModel, MissingMeasurement, Record, checksum
from bench.records.record_file import serialize_record
from bench.records.store import Store

MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)
ID = "a" * 12
OLD_RECORD = {
    "id": ID, "status": "done", "started": "", "finished": "", "group": "sweep-1", "command": "",
    "config": {"benchmark": {"name": "b"}}, "environment": {},
    "model": MODEL.model_dump(), "methods": [], "metrics": [], "costs": [], "gaps": [],
    "provenance": {},
}  # fmt: skip


def cost(scope, quantity, how, parts=None):
    row = {"scope": scope, "quantity": quantity, "unit": "1", "value": 4.0, "how": how}
    return row | {"parts": parts or {}, "note": None}


def gap(scope, quantity, reason, how=None):
    return {"scope": scope, "quantity": quantity, "reason": reason, "how": how}


def method(**more):
    fixed = {"name": "cut", "config": {}, "report": {}, "seconds": 1.0, "peak_bytes": None}
    return fixed | {"saving": "removed"} | more


def read_old(schema, folder, **fields):
    """Write a record file with the fields of an old schema, and read it as a record."""
    store, content = Store(folder), OLD_RECORD | fields | {"schema_version": schema}
    path = store.folder(ID) / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**content, "checksum": checksum(content)}))
    return store.get(ID)


def test_schema_1_flops_gaps_are_missing_measurements(tmp_path):
    kept = cost("model", "bytes", "counted")
    old = cost("forward 1x8", "flops_gaps", "counted", {"aten.addr": 1.0, "aten.odd_mm": 1.0})
    record = read_old(1, tmp_path, costs=[kept, old], gaps=[gap("1x8", "energy", "no counter")])
    assert record.schema_version == SCHEMA
    assert record.costs == (Cost(**kept),)
    assert [(missing.quantity, missing.reason, missing.how) for missing in record.missing] == [
        ("flops", "aten.addr", "counted"),
        ("flops", "aten.odd_mm", "counted"),
        ("energy", "no counter", None),
    ]
    assert record.missing_cost("flops", "forward 1x8").reason == "aten.addr"


def test_schema_2_fields_have_their_new_names(tmp_path):
    spent = {"tokens_per_batch": 64, "halved": 0, "given": 9, "computed": 3}
    engine = {"wanted": "shared", "used": "plain", "reasons": ["why"], "spent": spent}
    layers = [{"layer": 0, "removed": 3, "refit": {"rank": 2}}, {"layer": 1, "removed": 4}]
    record = read_old(
        2,
        tmp_path,
        methods=[
            method(report={"tokens": 5, "layers": layers}),
            method(saving="skipped", report={"layers": 2}),
        ],
        provenance={"seed": 7, "engine": engine},
    )
    assert record.schema_version == SCHEMA and record.sweep == "sweep-1"
    first, second = record.methods
    assert (first.effect, first.report) == ("removed", {"tokens": 5})
    assert [layer.removed for layer in first.layers] == [3, 4]
    assert first.layers[0].refit == {"rank": 2}
    # A number under `layers` is no report per layer: it stays.
    assert (second.effect, second.report, second.layers) == ("skipped", {"layers": 2}, ())
    assert record.provenance == {
        "seed": 7,
        "backend": {
            "requested": "prefix_sharing", "used": "padded", "reasons": ["why"], "spent": spent
        },
    }  # fmt: skip


def test_schema_2_quantities_have_their_new_names(tmp_path):
    record = read_old(
        2,
        tmp_path,
        costs=[
            cost("prefill 1x8", "limit_share", "measured"),
            cost("prefill 1x8", "realised", "measured"),
            cost("prefill 1x8", "speedup", "measured"),
        ],
        gaps=[gap("device", "limits", "out of memory"), gap("decode 1x8", "realised", "why")],
        provenance={"engine": None},
    )
    assert [row.quantity for row in record.costs] == [
        "roofline_efficiency",
        "realised_speedup_fraction",
        "speedup",
    ]
    assert [row.quantity for row in record.missing] == ["roofline", "realised_speedup_fraction"]
    assert record.provenance == {"backend": None}


def test_the_file_of_an_old_record_is_not_rewritten(tmp_path):
    record = read_old(2, tmp_path)
    written = json.loads((Store(tmp_path).folder(ID) / "record.json").read_text())
    assert (written["schema_version"], record.config) == (2, OLD_RECORD["config"])


def test_a_current_record_is_read_as_it_was_written(tmp_path):
    missing = MissingMeasurement(
        scope="forward 1x8", quantity="flops", reason="why", how="analytic"
    )
    layers = [{"layer": 0, "removed": 3}]
    record = Record(
        id=ID, started="", finished="", sweep=None, command="",
        config={"benchmark": {"name": "b"}}, environment={},
        model=MODEL, metrics=(), costs=(), missing=(missing,), provenance={},
        methods=({"name": "cut", "config": {}, "effect": "removed", "report": {}, "seconds": 1,
                  "layers": layers},),
    )  # fmt: skip
    Store(tmp_path).write(record, [], "")
    assert Store(tmp_path).get(ID) == record
    # Fields that mean nothing to the method are absent from the file, not null.
    assert json.loads(serialize_record(record))["methods"][0]["layers"] == layers
