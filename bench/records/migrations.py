"""Migration of older record schemas on read.

Schema 1 stored missing FLOPs as `flops_gaps` costs with the reasons as their parts; schema 2 stores
them as gaps.
"""

from __future__ import annotations

from bench.records.record import SCHEMA, MissingMeasurement, Record

READABLE_SCHEMAS = range(1, SCHEMA + 1)
SCHEMA_1_MISSING = "flops_gaps"


def migrate(record: Record) -> Record:
    """Convert a record of any readable schema to the current one."""
    if record.schema_version == SCHEMA:
        return record
    # The reasons were the names of the parts; their values carried nothing.
    told = tuple(
        MissingMeasurement(scope=cost.scope, quantity="flops", reason=reason, how=cost.how)
        for cost in record.costs
        if cost.quantity == SCHEMA_1_MISSING
        for reason in cost.parts
    )
    costs = tuple(cost for cost in record.costs if cost.quantity != SCHEMA_1_MISSING)
    today = {"schema_version": SCHEMA, "costs": costs, "gaps": (*told, *record.gaps)}
    return record.model_copy(update=today)
