"""`bench run`: one run, a sweep or a search, and its outcome."""

from __future__ import annotations

from bench.errors import EXIT_DONE, EXIT_FAILED, UserError
from bench.runner.estimate import read_budget
from bench.runner.launch import LaunchOutcome, launch, print_hydra_info
from bench.runner.session import Session
from bench.ui import fail, warn

INFO_FLAGS = frozenset({"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"})
"""Flags that Hydra answers itself; nothing is run."""


def run_command(arguments: list[str]) -> int:
    """`bench run`: run one config, a sweep or a search."""
    if any(argument.partition("=")[0] in INFO_FLAGS for argument in arguments):
        print_hydra_info(arguments)
        return EXIT_DONE
    arguments, budget = _without_budget(arguments)
    with Session() as session:
        return print_outcome(launch(arguments, session, budget=budget), session)


def _without_budget(arguments: list[str]) -> tuple[list[str], float | None]:
    """Return the arguments without `--budget TIME`, and its seconds."""
    words, budget = list(arguments), None
    for place, word in enumerate(arguments):
        name, equals, given = word.partition("=")
        if name != "--budget":
            continue
        if budget is not None:
            raise UserError("--budget is given twice: give it once")
        following = arguments[place + 1 : place + 2]
        budget = read_budget(given if equals else (following or [""])[0])
        words = [*arguments[:place], *arguments[place + (1 if equals else 2) :]]
    return words, budget


def print_outcome(outcome: LaunchOutcome, session: Session) -> int:
    """Print the outcome of a run, a sweep or a search, and return the exit code."""
    # Imported here: both load pandas or plotting code, for which the run need not wait.
    from bench.reporting.summary import print_summary
    from bench.reporting.terminal_views import print_search

    if not session.process_group.is_first:  # of several processes only the first prints
        return EXIT_FAILED if outcome.failures else EXIT_DONE
    if outcome.study_folder is not None:
        print_search(outcome.study_folder)
    else:
        print_summary(outcome.records, reused=outcome.reused)
    return print_problems(outcome)


def print_problems(outcome: LaunchOutcome) -> int:
    """Print warnings and failures without secrets, and return the exit code."""
    # Jobs often share a warning, such as an unreachable tracker; each text is printed once.
    for warning in dict.fromkeys(outcome.warnings):
        warn(warning)
    for failure in outcome.failures:
        fail(f"failed: {failure}")
    return EXIT_FAILED if outcome.failures else EXIT_DONE
