"""Published numbers of papers, as package data; `bench.reporting.tables.published` reads them."""
