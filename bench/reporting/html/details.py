"""Details of one run for its page: the record with long lists shortened."""

from __future__ import annotations

from typing import Any

from bench.records import Record

LONGEST_LIST = 100
"""List entries shown of a method's report; `record.json` has all of them."""


def details(record: Record) -> dict[str, Any]:
    """Return a record as plain data for the page of its run."""
    content = record.model_dump(mode="json")
    for method in content["methods"]:
        method["report"] = shortened(method["report"])
    return content


def shortened(value: Any) -> Any:
    """Cut long lists and append how many entries were cut."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        cut = [shortened(item) for item in value[:LONGEST_LIST]]
        left = len(value) - len(cut)
        return [*cut, f"{left} more in record.json"] if left else cut
    return value
