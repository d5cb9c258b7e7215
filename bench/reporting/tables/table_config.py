"""The config of a table, conf/table/NAME.yaml, and its lines with the runs that they need."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from string import Template
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import UserError, unknown_name

CONFIG_GROUP, MICRO = "table", "micro"
Overrides = tuple[str, ...]
Tree = dict[str, Any]
"""YAML before validation."""
Unit = Literal[
    "%", "share", "perplexity", "points", "s", "min", "h", "ms", "T", "count", "FLOP", "ratio"
]
PARTS = ("sections", "rows", "variants", "columns")
"""The parts of a table that can be selected on the command line: `rows=[Camera-P,NAEE]`."""


class _TableModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedTables(_TableModel):
    """Source of the published cells: a file of `results/published`, and tables in it."""

    file: str
    tables: tuple[str, ...]


class TableSection(_TableModel):
    """A section: lines that share a model; `run` is None if slimbench has no such model.

    `published` names the source's models that the section represents, `tables` their tables if they
    differ from the table's own. `differs` explains why its numbers are not those of the source, for
    example because another model replaces one that is not available.
    """

    run: tuple[str, ...] | None = ()
    variables: dict[str, str] = Field(default_factory=dict)
    differs: str | None = None
    published: tuple[str, ...] | None = None
    tables: tuple[str, ...] | None = None


class TableRow(_TableModel):
    """A method, once per variant, or only once with `variants: false`.

    A list of variants restricts where the method can be run; other variants show only the published
    number. `run` are its overrides, None if slimbench has no such method. `published` is its name
    in the source. `differs` explains why its numbers are not those of the source's row.
    """

    run: tuple[str, ...] | None = None
    variants: bool | tuple[str, ...] = True
    published: str | None = None
    differs: str | None = None


class TableColumn(_TableModel):
    """Identity of a number: of a task (`task`, `metric`, ...) or of a cost (`quantity`, `scope`).

    `of` is the number of tasks in an average. `published` is the column's name in the source;
    `differs` explains why the source's numbers are not comparable. `$NAME` in `task` is a variable
    of the section.
    """

    task: str | None = None
    metric: str = ""
    filter: str = "none"
    shots: int | None = 0
    split: str = ""
    harness: str = ""
    of: int | None = None
    quantity: str | None = None
    scope: str = "model"
    unit: Unit = "%"
    lower_is_better: bool = False
    published: str | None = None
    differs: str | None = None


class TableConfig(_TableModel):
    """One table. `runs` are overrides of all its runs; with several `seeds`, cells are means.

    `variants` maps a variant to the values of the variables `$NAME` in the rows' overrides. A
    `stand_in` uses other models than the source and is never compared with its numbers. `images`
    states how the source preprocessed images, by the keys of `model.processor`: numbers of runs
    with other values are not subtracted. Without `published` the table has only our numbers.
    `about` is text for the reader of the table's page. `against` maps rows to a row with which the
    page compares them, variant by variant. `to_dense` names columns beside which changes from the
    section's dense line are shown.
    """

    name: str
    title: str
    about: str | None = None
    published: PublishedTables | None = None
    runs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    sections: dict[str, TableSection]
    variants: dict[str, dict[str, str | int | float]] = Field(default_factory=dict)
    rows: dict[str, TableRow]
    columns: dict[str, TableColumn]
    against: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    to_dense: tuple[str, ...] = ()
    stand_in: bool = False
    images: dict[str, str | int] = Field(default_factory=dict)


def table_names() -> list[str]:
    """Return the names of all tables, including those of plug-ins."""
    from bench.config.composition import config_names

    return config_names(CONFIG_GROUP)


@cache  # A report builds every table twice, and composing is the slowest part of it.
def _composed_table(name: str) -> Tree:
    """Return the config of a table as written; the caller must not change it."""
    from omegaconf import OmegaConf

    from bench.config.composition import compose_section

    names = table_names()
    if name not in names:
        raise unknown_name("table", name, names)
    composed = compose_section(CONFIG_GROUP, name)
    return cast(Tree, OmegaConf.to_container(composed[CONFIG_GROUP], resolve=True))


def table_scales(name: str) -> tuple[str | None, ...]:
    """Return the scales of a table: None for the real models, and `micro` if it has a stand-in."""
    return (None, MICRO) if _composed_table(name).get(MICRO) is not None else (None,)


COSTS, TO_DENSE = "costs", "to_dense"
COST_COLUMNS: Tree = {
    "FLOPs": {"quantity": "flops", "scope": "forward", "unit": "FLOP", "lower_is_better": True},
    "parameters": {"quantity": "parameters", "unit": "count", "lower_is_better": True},
}
"""Columns of counted costs that can be added to any table; no source has printed them."""


def load_table_config(
    name: str, scale: str | None = None, chosen: dict[str, list[str]] | None = None
) -> TableConfig:
    """Return one table's config; with `scale="micro"`, the config of its stand-in.

    The `micro` part is merged into the rest: mappings are merged, lists are replaced, null removes.
    `chosen` restricts the table to some sections, rows, variants or columns. `costs` adds columns,
    and `to_dense` adds changes from the dense model.

    Raises:
        UserError: there is no such table, scale, section, row, variant, column or cost.
    """
    if scale not in (None, MICRO):
        raise UserError(f"scale={scale}: give scale={MICRO}, or omit it for the real table")
    plain = copy.deepcopy(_composed_table(name))
    micro = plain.pop(MICRO, None)
    if scale == MICRO:
        if micro is None:
            raise UserError(f"table {name} has no stand-in on the embedded models: omit scale")
        # `stand_in` is set here instead of in the file, so that a stand-in cannot be taken for the
        # real table.
        plain = _without_nulls(_merged(plain, {**micro, "stand_in": True}))
    # After the merge, so that names which only the stand-in has can be selected.
    for part, kept in (chosen or {}).items():
        if part in PARTS:
            plain[part] = _selected(part, plain.get(part, {}), kept)
    # After the table's own columns, because a selection of columns does not affect them.
    added = _selected(COSTS, COST_COLUMNS, (chosen or {}).get(COSTS, []))
    plain["columns"] = {**plain.get("columns", {}), **added}
    if TO_DENSE in (chosen or {}):
        plain[TO_DENSE] = list(_selected(TO_DENSE, plain["columns"], (chosen or {})[TO_DENSE]))
    try:
        return TableConfig.model_validate({**plain, "name": name})
    except ValidationError as error:
        # The first fault suffices, because later ones often follow from it.
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"table {name}: {key}: {fault['msg'].lower()}") from None


def _merged(below: Tree, above: Tree) -> Tree:
    """Merge mappings key by key; all other values of `above` replace those of `below`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merged(below[key], value) if both else value
    return merged


def _without_nulls(plain: Tree) -> Tree:
    """Drop sections, rows, variants and columns that are null."""
    for part in PARTS:
        plain[part] = {k: v for k, v in plain.get(part, {}).items() if v is not None}
    return plain


def _selected(part: str, there: Tree, kept: list[str]) -> Tree:
    for name in kept:
        if name not in there:
            raise unknown_name(f"name in {part}", name, there)
    return {name: value for name, value in there.items() if name in kept}


@dataclass(frozen=True)
class TableSlot:
    """One line and the overrides of its runs, one per seed; no runs if it cannot be run."""

    section: str
    row: str
    variant: str
    runs: tuple[Overrides, ...]


def table_slots(config: TableConfig) -> list[TableSlot]:
    """Return every line of a table: per section, rows without a variant, then by variant."""
    return [
        TableSlot(section, row, variant, tuple(_slot_runs(config, section, row, variant)))
        for section in config.sections
        for row, variant in _row_order(config)
    ]


def _row_order(config: TableConfig) -> Iterator[tuple[str, str]]:
    """Yield rows with their variants; an empty string means no variant."""
    fixed = [name for name, row in config.rows.items() if not row.variants or not config.variants]
    # The dense baseline has no variant, so it is first in every section.
    yield from ((name, "") for name in fixed)
    for variant in config.variants:
        yield from ((name, variant) for name in config.rows if name not in fixed)


def _slot_runs(config: TableConfig, section: str, row: str, variant: str) -> Iterator[Overrides]:
    method, model = config.rows[row], config.sections[section]
    possible = not isinstance(method.variants, tuple) or variant in method.variants
    if method.run is None or model.run is None or not possible:
        return
    variables = {**model.variables, **config.variants.get(variant, {})}
    # From general to specific, because Hydra uses the last override of a key.
    texts = (*config.runs, *model.run, *method.run)
    run = tuple(Template(text).safe_substitute(variables) for text in texts)
    for seed in config.seeds or (None,):
        yield with_overrides(run, () if seed is None else (f"seed={seed}",))


def with_overrides(run: Overrides, given: Overrides) -> Overrides:
    """Return a run's overrides and `given`, which takes precedence if both set a key."""
    # Overridden ones are dropped, so that every key has a single value.
    keys = {override.split("=")[0] for override in given}
    return (*(override for override in run if override.split("=")[0] not in keys), *given)


@cache
def recorded_name(group: str, choice: str) -> str:
    """Return the name under which a run records a choice; for a folder, the folder's own name."""
    from bench.config.composition import compose_section
    from bench.config.overrides import model_config
    from bench.security import CONFIG_DIR

    if not choice or (CONFIG_DIR / group / f"{choice}.yaml").is_file():
        return choice
    own = model_config(choice) if group == "model" else None
    if own is None:
        try:
            own = compose_section(group, choice)[group]
        except Exception:  # Hydra's, for a missing choice, of which there is no record.
            return choice
    return str(own.get("name", choice))
