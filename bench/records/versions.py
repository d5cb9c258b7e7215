"""What records of older programs said differently, brought into today's form when they are read.

Version 1 told FLOPs that could not be had as costs, rows `flops_gaps` with the reasons as their
parts; since version 2 they are gaps like any other.
"""

from __future__ import annotations

from bench.records.record import SCHEMA, GapPart, Record

READABLE = range(1, SCHEMA + 1)
GAPS = "flops_gaps"


def renewed(record: Record) -> Record:
    """Return a record of any readable version as this program would have written it."""
    if record.schema_version == SCHEMA:
        return record
    told = tuple(
        GapPart(scope=cost.scope, quantity="flops", reason=reason, how=cost.how)
        for cost in record.costs
        if cost.quantity == GAPS
        for reason in cost.parts
    )
    costs = tuple(cost for cost in record.costs if cost.quantity != GAPS)
    today = {"schema_version": SCHEMA, "costs": costs, "gaps": (*told, *record.gaps)}
    return record.model_copy(update=today)
