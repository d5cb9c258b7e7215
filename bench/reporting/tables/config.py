"""Schema of `conf/table/NAME.yaml`: rows, columns, runs, and the identity of each number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import UserError, unknown

GROUP, MICRO = "table", "micro"
Unit = Literal["%", "share", "perplexity", "points", "s", "min", "h", "ms", "T", "count", "FLOP"]
PARTS = ("blocks", "rows", "settings", "columns")
"""The parts of a table that can be selected on the command line: `rows=[Camera-P,NAEE]`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedIn(_Part):
    """Source of the published cells: a file of `bench.reporting.published` and tables in it."""

    file: str
    tables: tuple[str, ...]


class Block(_Part):
    """A section: lines that share a model; `run` is None if slimbench has no such model.

    `published` names the source's models that the section stands for, `tables` the tables they are
    in if not in the table's own.
    """

    run: tuple[str, ...] | None = ()
    variables: dict[str, str] = Field(default_factory=dict)
    published: tuple[str, ...] | None = None
    tables: tuple[str, ...] | None = None


class Row(_Part):
    """A method, once per variant, or once only with `settings: false`.

    A list of variants restricts where the method can be run; in the others only the published
    number is shown. `run` holds its overrides, None if slimbench has no such method. `published` is
    its name in the source. `differs` explains why its numbers are not those of the source's row.
    """

    run: tuple[str, ...] | None = None
    settings: bool | tuple[str, ...] = True
    published: str | None = None
    differs: str | None = None


class Column(_Part):
    """Identity of a number: of a task (`task`, `metric`, ...) or of a cost (`quantity`, `scope`).

    `of` is the number of tasks in an average. `published` is the column's name in the source;
    `differs` explains why the source's numbers are different ones. `$NAME` in `task` is a variable
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


class TableConfig(_Part):
    """One table. `runs` are overrides of all its runs; with several `seeds`, cells are means.

    `settings` maps a variant to the values of the variables `$NAME` in the rows' overrides. A
    `stand_in` runs on different models than the source's and is never subtracted from it.
    """

    name: str
    title: str
    published: PublishedIn
    runs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    blocks: dict[str, Block]
    settings: dict[str, dict[str, str | int | float]] = Field(default_factory=dict)
    rows: dict[str, Row]
    columns: dict[str, Column]
    stand_in: bool = False


def names() -> list[str]:
    """Return the names of all tables, third-party ones included."""
    from bench.compose import options

    return options(GROUP)


def load(name: str, scale: str | None = None, chosen: dict[str, list[str]] | None = None) -> Any:
    """Return one table's config; with `scale="micro"`, the config of its stand-in.

    The `micro` part is merged into the rest: mappings merge, lists are replaced, null removes.
    `chosen` restricts the table to some sections, rows, variants or columns.

    Raises:
        UserError: there is no such table, scale, section, row, variant or column.
    """
    from hydra import compose
    from omegaconf import OmegaConf

    from bench.compose import hydra_tree

    if name not in names():
        raise unknown("table", name, names())
    if scale not in (None, MICRO):
        raise UserError(f"scale={scale}: give scale={MICRO}, or omit it for the real table")
    with hydra_tree():
        composed = compose(f"{GROUP}/{name}")
    plain: Any = OmegaConf.to_container(composed[GROUP], resolve=True)
    micro = plain.pop(MICRO, None)
    if scale == MICRO:
        # `stand_in` is set here and not in the file, so that no stand-in can pass for the real
        # table.
        plain = _without_nulls(_laid_over(plain, {**(micro or {}), "stand_in": True}))
    # After the merge: names that only the stand-in has can be chosen as well.
    for part, kept in (chosen or {}).items():
        plain[part] = _only(part, plain.get(part, {}), kept)
    try:
        return TableConfig(name=name, **plain)
    except ValidationError as error:
        # The first fault is enough; later ones often follow from it.
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"table {name}: {key}: {fault['msg'].lower()}") from None


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; all other values of `above` replace those of `below`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _without_nulls(plain: dict[str, Any]) -> dict[str, Any]:
    """Drop sections, rows, variants and columns that are null."""
    for part in PARTS:
        plain[part] = {k: v for k, v in plain.get(part, {}).items() if v is not None}
    return plain


def _only(part: str, there: dict[str, Any], kept: list[str]) -> dict[str, Any]:
    for name in kept:
        if name not in there:
            raise unknown(f"name in {part}", name, there)
    return {name: value for name, value in there.items() if name in kept}
