"""`bench status` and `bench resume`."""

from __future__ import annotations

import argparse

from bench.sweeps.plan import all_sweeps, find_sweep
from bench.sweeps.status import job_rows, sweep_summary
from bench.ui import print_rows


def status(given: argparse.Namespace) -> int:
    """`bench status [SWEEP]`."""
    if given.sweep is None:
        summaries = [sweep_summary(plan) for plan in all_sweeps(given.results_dir)]
        return print_rows(summaries, given.json)
    return print_rows(job_rows(find_sweep(given.results_dir, given.sweep)), given.json)


def resume(given: argparse.Namespace) -> int:
    """`bench resume SWEEP`."""
    # Imported here: `status`, which many people run often, does not need Hydra.
    from bench.cli.commands.run import print_outcome
    from bench.runner.launch import resume_sweep
    from bench.runner.session import Session

    with Session(freezes=True) as session:
        outcome = resume_sweep(given.results_dir, given.sweep, session, given.allowed)
        return print_outcome(outcome, session)
