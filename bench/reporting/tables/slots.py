"""Slots: the lines of a table in order, each with the runs that fill it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from string import Template

from bench.reporting.tables.config import TableConfig

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """One line and the overrides of its runs, one per seed; no runs if it cannot be run here."""

    block: str
    row: str
    setting: str
    runs: tuple[Overrides, ...]


def slots(config: TableConfig) -> list[Slot]:
    """Return every line of a table: per section first rows without a variant, then by variant."""
    return [
        Slot(block, row, setting, tuple(_runs(config, block, row, setting)))
        for block in config.blocks
        for row, setting in _order(config)
    ]


def _order(config: TableConfig) -> Iterator[tuple[str, str]]:
    """Yield rows with their variants; an empty string means no variant."""
    fixed = [name for name, row in config.rows.items() if not row.settings or not config.settings]
    # The dense baseline has no variant, so it opens every section.
    yield from ((name, "") for name in fixed)
    for setting in config.settings:
        yield from ((name, setting) for name in config.rows if name not in fixed)


def _runs(config: TableConfig, block: str, row: str, setting: str) -> Iterator[Overrides]:
    method, model = config.rows[row], config.blocks[block]
    possible = not isinstance(method.settings, tuple) or setting in method.settings
    if method.run is None or model.run is None or not possible:
        return
    variables = {**model.variables, **config.settings.get(setting, {})}
    # From general to specific, as Hydra lets the last override of a key win.
    texts = (*config.runs, *model.run, *method.run)
    run = tuple(Template(text).safe_substitute(variables) for text in texts)
    for seed in config.seeds or (None,):
        yield latest(run, () if seed is None else (f"seed={seed}",))


def latest(run: Overrides, given: Overrides) -> Overrides:
    """Return a run's overrides with `given` appended; `given` wins where both set a key."""
    # An override that loses is dropped, so that every reader of the overrides finds one value per
    # key.
    keys = {override.split("=")[0] for override in given}
    return (*(override for override in run if override.split("=")[0] not in keys), *given)
