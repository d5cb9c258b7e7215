"""The commands that compute: runs, sweeps, tables, and what is derived from a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bench.errors import EXIT_DONE, EXIT_FAILED
from bench.security import redact

if TYPE_CHECKING:
    from bench.runner.launch import LaunchOutcome


def run_command(overrides: list[str]) -> int:
    """`bench run`: run one config, a sweep or a search."""
    # Hydra answers its own informational flags; nothing is run.
    if {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"} & set(overrides):
        from bench.runner.launch import print_hydra_info

        print_hydra_info(overrides)
        return EXIT_DONE
    from bench.runner.execute import launch_run

    return print_outcome(launch_run(overrides))


def print_outcome(outcome: LaunchOutcome) -> int:
    """Print the outcome of a run, a sweep or a search, and return the exit code."""
    from bench.evaluation.distributed import current_process_group
    from bench.reporting.summary import print_summary
    from bench.reporting.terminal_views import print_search

    if not current_process_group().is_first:  # of several processes only the first prints
        return EXIT_FAILED if outcome.failures else EXIT_DONE
    if outcome.searched is not None:
        print_search(outcome.searched)
    else:
        print_summary(outcome.records, reused=outcome.reused)
    # Jobs often share a warning, such as an unreachable tracker; each text is printed once.
    for warning in dict.fromkeys(outcome.warnings):
        print(f"bench: {redact(warning)}", file=sys.stderr)
    for failure in outcome.failures:
        print(f"bench: failed: {redact(failure)}", file=sys.stderr)
    return EXIT_FAILED if outcome.failures else EXIT_DONE
