"""`bench status` and `bench resume`: the state of sweeps, and how to continue them."""

from __future__ import annotations

import argparse

from bench.sweeps.plan import all_sweeps, find_sweep
from bench.sweeps.status import job_rows, sweep_summary
from bench.ui import print_rows


def status(given: argparse.Namespace) -> int:
    """`bench status [SWEEP]`."""
    if given.sweep is None:
        summaries = [sweep_summary(plan) for plan in all_sweeps(given.results_dir)]
        rows = summaries if given.json else [_shown_sweep(each) for each in summaries]
        return print_rows(rows, as_json=given.json)
    rows = job_rows(find_sweep(given.results_dir, given.sweep))
    return print_rows(rows if given.json else _without_empty(rows), as_json=given.json)


ARGUMENTS_SHOWN = 120
"""Maximum number of characters; `--json` shows all of them, and `bench status SWEEP` those in which
jobs differ."""


def _shown_sweep(summary: dict[str, object]) -> dict[str, object]:
    """Return a sweep's row for a terminal, without the arguments that all listed sweeps share."""
    words = [
        word
        for word in str(summary["arguments"]).split(" ")
        if word not in ("-m", "--multirun") and not word.startswith("results_dir=")
    ]
    text = " ".join(words)
    cut = f"{text[: ARGUMENTS_SHOWN - 1]}…" if len(text) > ARGUMENTS_SHOWN else text
    return {**summary, "arguments": cut}


def _without_empty(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return rows without empty columns: most jobs, for example, have no log."""
    filled = [
        key for row in rows[:1] for key in row if any(row[key] not in (None, "") for row in rows)
    ]
    return [{key: row[key] for key in filled} for row in rows]


def resume(given: argparse.Namespace) -> int:
    """`bench resume SWEEP`."""
    # Imported here, because `status` is used often and does not need Hydra.
    from bench.cli.commands.run import print_outcome
    from bench.runner.launch import resume_sweep
    from bench.runner.session import Session

    with Session(freezes=True) as session:
        outcome = resume_sweep(given.results_dir, given.sweep, session, given.allowed)
        return print_outcome(outcome, session)
