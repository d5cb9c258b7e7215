"""Records of a table's lines, found by everything that determines a result except the device.

Comparing identities is exact but requires Hydra to compose a run, which is slow. Choices of config
groups can be read from the overrides, and rule out nearly all records first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bench.reporting.tables.table_config import Overrides, TableSlot, recorded_name

if TYPE_CHECKING:
    from bench.records import Record


class RunChoices(NamedTuple):
    """A run's choices of config groups, which can be compared without composing a config."""

    model: str
    benchmark: str
    methods: tuple[str, ...]


NamedRecords: TypeAlias = "Mapping[RunChoices, Sequence[Record]]"


def by_choices(records: Sequence[Record]) -> NamedRecords:
    """Group records by their choices of config groups, newest first."""
    named: dict[RunChoices, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.started, reverse=True):
        named.setdefault(_choices_of_record(record), []).append(record)
    return named


def records_of_table(
    slots: Sequence[TableSlot], records: Sequence[Record]
) -> dict[TableSlot, list[Record]]:
    """Return the records of each line whose runs all have one; the newest of each run is used."""
    return match_records(slots, by_choices(records))


def match_records(lines: Sequence[TableSlot], named: NamedRecords) -> dict[TableSlot, list[Record]]:
    """Return the records of each line whose runs all have one, of records grouped by choices."""
    found: dict[TableSlot, list[Record]] = {}
    for slot in lines:
        hits = [_newest_record(run, named.get(_choices_in_overrides(run), ())) for run in slot.runs]
        if hits and all(hits):
            found[slot] = [hit for hit in hits if hit is not None]
    return found


def _choices_of_record(record: Record) -> RunChoices:
    config = record.config
    model, methods = config.get("model", {}), config.get("method", {})
    name, adapter = str(model.get("name")), model.get("adapter")
    # Suffixes that a run adds to the name of its choice: the adapter, and a harness's tasks.
    plain = name.removesuffix(f"+{PurePath(adapter).name}") if adapter else name
    benchmark = config["benchmark"]["name"].partition(":")[0]
    return RunChoices(plain, benchmark, tuple(methods))


def _choices_in_overrides(run: Overrides) -> RunChoices:
    chosen = dict(override.split("=", 1) for override in run)
    methods = chosen.get("method", "").strip("[]").split(",")
    # `method=dense` and no method are the same run.
    named = tuple(name for name in methods if name not in ("", "dense"))
    model = chosen.get("model.name") or recorded_name("model", chosen.get("model", ""))
    return RunChoices(model, recorded_name("benchmark", chosen.get("benchmark", "")), named)


def _newest_record(run: Overrides, likely: Sequence[Record]) -> Record | None:
    """Return the first of the records (newest first) whose identity equals the run's."""
    from bench.config.run_config import identity_of

    for record in likely:
        # The provenance shows whether the run read calibration text or prompts. Settings that no
        # method read do not affect results and are left out of the identity.
        calibrated = record.provenance.get("calibration") is not None
        prompted = record.provenance.get("prompts") is not None
        try:
            found = identity_of(record.config, calibrated=calibrated, prompted=prompted)
        except (KeyError, TypeError, AttributeError):
            continue  # The config is of another program and cannot match our runs.
        if found == _composed_identity(run):
            return record
    return None


@functools.lru_cache(maxsize=1024)
def _composed_identity(run: Overrides) -> dict[str, object]:
    """Compose a run and return its identity; cached, because composing is slow."""
    from bench.config.composition import compose_run_config

    return compose_run_config(list(run)).identity()
