"""Papers' tables: our numbers next to the published ones, from records alone."""

from bench.reporting.tables.building import build, table_of, tables_of
from bench.reporting.tables.config import TableConfig, load, names
from bench.reporting.tables.slots import Slot, slots
from bench.reporting.tables.table import Agreement, Cell, Head, Line, Ours, Table

__all__ = [
    "Agreement",
    "Cell",
    "Head",
    "Line",
    "Ours",
    "Slot",
    "Table",
    "TableConfig",
    "build",
    "load",
    "names",
    "slots",
    "table_of",
    "tables_of",
]
