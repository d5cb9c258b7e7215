"""One self-contained HTML file for all records: no server, no network, nothing to install."""

from bench.reporting.html.report import WrittenReport, write_report
from bench.reporting.html.samples import SampleShare

__all__ = [
    "SampleShare",
    "WrittenReport",
    "write_report",
]
