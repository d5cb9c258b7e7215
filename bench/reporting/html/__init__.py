"""One self-contained HTML file over all records: no server, no network, nothing to install."""

from bench.reporting.html.report import Written, write_report
from bench.reporting.html.samples import Share

__all__ = ["Share", "Written", "write_report"]
