"""Output for users: messages and progress on stderr, results on stdout.

No other module prints. Messages are records of the logger `bench`, so that a host program can
filter them or add its own handlers. BENCH_LOG_LEVEL=INFO omits the lines about progress, WARNING
also omits the notes.
"""

from bench.security import clean
from bench.ui.messages import fail, note, says_notes, warn
from bench.ui.progress import SILENT, Progress
from bench.ui.results import (
    console,
    draw_rows,
    format_quantity,
    print_json,
    print_rows,
    print_text,
    terminal_table,
    widest_fitting,
)

__all__ = [
    "SILENT",
    "Progress",
    "clean",
    "console",
    "draw_rows",
    "fail",
    "format_quantity",
    "note",
    "print_json",
    "print_rows",
    "print_text",
    "says_notes",
    "terminal_table",
    "warn",
    "widest_fitting",
]
