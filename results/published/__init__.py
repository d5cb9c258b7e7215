"""The papers' numbers, shipped as package data; `bench.reporting.published` reads them."""
