"""Papers' tables: our numbers beside the published ones, built only from records."""

from bench.reporting.tables.builder import build_table, table_of, tables_of
from bench.reporting.tables.matching import records_of_table
from bench.reporting.tables.table import (
    ColumnHead,
    OrderAgreement,
    OurValue,
    Table,
    TableCell,
    TableLine,
)
from bench.reporting.tables.table_config import (
    TableConfig,
    TableSlot,
    load_table_config,
    table_names,
    table_scales,
    table_slots,
)

__all__ = [
    "ColumnHead",
    "OrderAgreement",
    "OurValue",
    "Table",
    "TableCell",
    "TableConfig",
    "TableLine",
    "TableSlot",
    "build_table",
    "load_table_config",
    "records_of_table",
    "table_names",
    "table_of",
    "table_scales",
    "table_slots",
    "tables_of",
]
