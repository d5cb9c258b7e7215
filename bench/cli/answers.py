"""Exit codes of commands, and their output of rows."""

from __future__ import annotations

import json
from typing import Any

# 75 is EX_TEMPFAIL of sysexits.h, which schedulers and scripts understand as "retry later".
DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> int:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return DONE
    from bench.reporting.terminal import print_rows as draw

    draw(rows)
    return DONE
