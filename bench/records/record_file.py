"""The text of a record's file: checksums that reveal damage, and migration of older schemas.

Schema 1 stores missing FLOPs as `flops_gaps` costs with the reasons as their parts; schema 2 stores
them in `gaps`. Schema 3 renames fields (`effect`, `missing`, `sweep`, `provenance.backend`) and two
quantities, and keeps what a method reports per layer apart from the rest of its report.

Migrations convert the JSON content, because the fields of an old record are not those of `Record`.
The config is never changed, because a record states the config that the run was given.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

from pydantic import ValidationError

from bench.records.json_values import is_surely_storable, parse_json
from bench.records.leaves import first_fault
from bench.records.record import SCHEMA, JsonObject, Record, checksum

_TEXT_CHECKSUM = ',\n "text_checksum": "'
_END = "\n}"
READABLE_SCHEMAS = range(1, SCHEMA + 1)
_QUANTITIES = {"limit_share": "roofline_efficiency", "realised": "realised_speedup_fraction"}
_MISSING_QUANTITIES = {**_QUANTITIES, "limits": "roofline"}
_BACKENDS = {"shared": "prefix_sharing", "plain": "padded"}


def serialize_record(record: Record) -> str:
    """Return the content of a record file, with checksums that reveal damage."""
    return with_checksum(json.loads(record.model_dump_json()))


def with_checksum(content: JsonObject) -> str:
    """Return the text of a JSON object with two checksums: of its values and of its text."""
    text = json.dumps({**content, "checksum": checksum(content)}, indent=1)
    return f'{text.removesuffix(_END)}{_TEXT_CHECKSUM}{_digest(text.encode())}"{_END}\n'


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def parse_record(text: bytes) -> Record:
    """Parse and validate the text of a record file; a `ValueError` gives the reason in one line."""
    # A file as this program writes it is parsed once; others take the slower path below.
    if is_surely_storable(text) and _is_as_written(text):
        with suppress(ValidationError):
            found = _RecordFile.model_validate_json(text, strict=True)
            # The file itself must state its schema; the default of the field does not count.
            if found.schema_version == SCHEMA and "schema_version" in found.model_fields_set:
                return _without_checksum(found)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("not a record: the file does not contain a JSON object")
    version = content.get("schema_version")
    if version not in READABLE_SCHEMAS:
        raise ValueError(f"its schema is version {version!r}, this program reads up to {SCHEMA}")
    # Before validation and migration, which change values. The checksum of the values is used,
    # because other programs may have reformatted the file.
    content.pop("text_checksum", None)
    expected = content.pop("checksum", None)
    # Some of the first records have none.
    if expected is None and version == SCHEMA:
        raise ValueError("it has no checksum: the file was changed by hand")
    if expected is not None and expected != checksum(content):
        raise ValueError("its checksum does not match: the file was changed or damaged")
    try:
        # Strict, so that a number is not accepted as text; as JSON, where a list may be a tuple.
        return Record.model_validate_json(json.dumps(_migrate(content)), strict=True)
    except ValidationError as error:
        raise ValueError(f"not a record: {first_fault(error)}") from None


def _is_as_written(text: bytes) -> bool:
    """Return whether a file is, byte by byte, what `serialize_record` wrote."""
    # The digest is of bytes, because the canonical JSON takes as long as the rest of reading.
    before, found, after = text.rpartition(_TEXT_CHECKSUM.encode())
    return bool(found) and after == f'{_digest(before + _END.encode())}"{_END}\n'.encode()


def _without_checksum(stored: _RecordFile) -> Record:
    values = {name: getattr(stored, name) for name in Record.model_fields}
    own = {"checksum", "text_checksum"}
    return Record.model_construct(stored.model_fields_set - own, **values)


class _RecordFile(Record):
    """A record and its checksums, as stored in its file."""

    checksum: str | None = None
    text_checksum: str | None = None


def _migrate(content: JsonObject) -> JsonObject:
    """Convert the content of a record of any readable schema to the current one."""
    try:
        if content["schema_version"] == 1:
            content = _to_schema_2(content)
        if content["schema_version"] == 2:
            content = _to_schema_3(content)
    except (KeyError, TypeError, AttributeError):
        # Not a record of that schema. Validation, which comes next, names the faulty field.
        pass
    return content


def _to_schema_2(content: JsonObject) -> JsonObject:
    # The reasons were the names of the parts; their values carried nothing.
    missing = [
        {"scope": cost["scope"], "quantity": "flops", "reason": reason, "how": cost["how"]}
        for cost in content["costs"]
        if cost["quantity"] == "flops_gaps"
        for reason in cost["parts"]
    ]
    costs = [cost for cost in content["costs"] if cost["quantity"] != "flops_gaps"]
    gaps = [*missing, *content.get("gaps", ())]
    return {**content, "schema_version": 2, "costs": costs, "gaps": gaps}


def _to_schema_3(content: JsonObject) -> JsonObject:
    new = {**content, "schema_version": 3}
    new["sweep"] = new.pop("group")
    new["missing"] = _renamed(new.pop("gaps", ()), _MISSING_QUANTITIES)
    new["costs"] = _renamed(new["costs"], _QUANTITIES)
    new["methods"] = [_method_of_schema_3(method) for method in new["methods"]]
    new["provenance"] = dict(new["provenance"])
    if "engine" in new["provenance"]:
        new["provenance"]["backend"] = _backend_of_schema_3(new["provenance"].pop("engine"))
    return new


def _renamed(rows: list[JsonObject], names: dict[str, str]) -> list[JsonObject]:
    return [{**row, "quantity": names.get(row["quantity"], row["quantity"])} for row in rows]


def _method_of_schema_3(method: JsonObject) -> JsonObject:
    new = {**method, "report": dict(method["report"])}
    new["effect"] = new.pop("saving")
    layers = new["report"].get("layers")
    # Some methods stored a number under the same key: the layer at which they cut.
    if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers):
        new["layers"] = new["report"].pop("layers")
    return new


def _backend_of_schema_3(engine: JsonObject | None) -> JsonObject | None:
    if engine is None:
        return None
    new = {**engine, "used": _BACKENDS.get(engine["used"], engine["used"])}
    requested = new.pop("wanted")
    return {"requested": _BACKENDS.get(requested, requested), **new}
