"""bench status, bench resume."""

from __future__ import annotations

import argparse

from bench.cli.commands.run import print_outcome
from bench.ui import print_rows


def status(given: argparse.Namespace) -> int:
    """`bench status [SWEEP]`."""
    from bench.sweeps.plan import all_sweeps, find_sweep
    from bench.sweeps.status import job_rows as jobs
    from bench.sweeps.status import sweep_summary

    if given.sweep is None:
        return print_rows(
            [sweep_summary(plan) for plan in all_sweeps(given.results_dir)], given.json
        )
    return print_rows(jobs(find_sweep(given.results_dir, given.sweep)), given.json)


def resume(given: argparse.Namespace) -> int:
    """`bench resume SWEEP`."""
    from bench.runner.execute import resume_sweep

    return print_outcome(resume_sweep(given.results_dir, given.sweep))
