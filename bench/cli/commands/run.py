"""`bench run`: one run, a sweep or a search, and its outcome."""

from __future__ import annotations

from bench.cli.arguments import split_option
from bench.errors import EXIT_DONE, EXIT_FAILED
from bench.runner.estimate import read_budget
from bench.runner.launch import LaunchOutcome, launch, print_hydra_info
from bench.runner.session import Session
from bench.ui import fail, warn

INFO_FLAGS = frozenset({"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"})
"""Flags that Hydra handles itself; nothing is run."""
BUDGET_OPTION = "--budget"


def run_command(arguments: list[str]) -> int:
    """`bench run`: run one config, a sweep or a search."""
    names = {argument.partition("=")[0] for argument in arguments}
    if names & INFO_FLAGS:
        print_hydra_info(arguments)
        return EXIT_DONE
    budget = None
    if BUDGET_OPTION in names:
        text, arguments = split_option(arguments, BUDGET_OPTION)
        budget = read_budget(text or "")
    with Session(freezes=True) as session:
        return print_outcome(launch(arguments, session, budget=budget), session)


def print_outcome(outcome: LaunchOutcome, session: Session) -> int:
    """Print the outcome of a run, a sweep or a search, and return the exit code."""
    # Imported here, because both load pandas or plotting code, which the run does not need.
    from bench.reporting.summary import print_summary
    from bench.reporting.terminal_views import print_search

    if not session.process_group.is_first:  # Only the first of several processes prints.
        return EXIT_FAILED if outcome.failures else EXIT_DONE
    if outcome.study_folder is not None:
        print_search(outcome.study_folder)
    else:
        print_summary(outcome.records, reused=outcome.reused)
    return print_problems(outcome)


def print_problems(outcome: LaunchOutcome) -> int:
    """Print warnings and failures without secrets, and return the exit code."""
    # Jobs often have the same warning, such as an unreachable tracker; each text is printed once.
    for warning in dict.fromkeys(outcome.warnings):
        warn(warning)
    for failure in outcome.failures:
        fail(f"failed: {failure}")
    return EXIT_FAILED if outcome.failures else EXIT_DONE
