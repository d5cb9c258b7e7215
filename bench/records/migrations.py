"""Migration of older record schemas on read.

Schema 1 stores missing FLOPs as `flops_gaps` costs with the reasons as their parts; schema 2 stores
them in `gaps`. Schema 3 renames fields (`effect`, `missing`, `sweep`, `provenance.backend`) and two
quantities, and keeps what a method reports per layer apart from the rest of its report.

Migrations convert the JSON content, because the fields of an old record are not those of `Record`.
The config is never changed, because a record states the config that the run was given.
"""

from __future__ import annotations

from bench.records.record import SCHEMA, JsonObject

READABLE_SCHEMAS = range(1, SCHEMA + 1)
_QUANTITIES = {"limit_share": "roofline_efficiency", "realised": "realised_speedup_fraction"}
_MISSING_QUANTITIES = {**_QUANTITIES, "limits": "roofline"}
_BACKENDS = {"shared": "prefix_sharing", "plain": "padded"}


def migrate(content: JsonObject) -> JsonObject:
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
