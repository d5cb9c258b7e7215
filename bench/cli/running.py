"""The commands that compute: runs, sweeps, tables, and what is derived from a run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from bench.cli.answers import DONE, FAILED, WRONG, print_rows
from bench.errors import UserError
from bench.secrets import hide

if TYPE_CHECKING:
    from bench.launch import Launched


def run(overrides: list[str]) -> int:
    """`bench run`: run one config, a sweep or a search."""
    # Hydra answers its own informational flags; nothing is run.
    if {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"} & set(overrides):
        from bench.launch import ask_hydra

        ask_hydra(overrides)
        return DONE
    from bench.run import start

    return _came(start(overrides))


def _came(outcome: Launched) -> int:
    """Print the outcome of a run, a sweep or a search, and return the exit code."""
    from bench.evaluation.ranks import joined
    from bench.reporting.search import print_search
    from bench.reporting.summary import print_summary

    if not joined().is_first:  # of several processes only the first prints
        return FAILED if outcome.failures else DONE
    if outcome.searched is not None:
        print_search(outcome.searched)
    else:
        print_summary(outcome.records, reused=outcome.reused)
    # Jobs often share a warning, such as an unreachable tracker; each text is printed once.
    for warning in dict.fromkeys(outcome.warnings):
        print(f"bench: {hide(warning)}", file=sys.stderr)
    for failure in outcome.failures:
        print(f"bench: failed: {hide(failure)}", file=sys.stderr)
    return FAILED if outcome.failures else DONE


def status(given: argparse.Namespace) -> int:
    """`bench status [SWEEP]`."""
    from bench.sweep.plan import every, find
    from bench.sweep.state import summary
    from bench.sweep.state import table as jobs

    if given.sweep is None:
        return print_rows([summary(plan) for plan in every(given.results_dir)], given.json)
    return print_rows(jobs(find(given.results_dir, given.sweep)), given.json)


def resume(given: argparse.Namespace) -> int:
    """`bench resume SWEEP`."""
    from bench.run import go_on

    return _came(go_on(given.results_dir, given.sweep))


def gc(given: argparse.Namespace) -> int:
    """`bench gc`: list unreferenced files, and remove them once confirmed."""
    from bench.garbage import find, remove

    found = find(given.results_dir)
    rows = [{"path": str(item.path), "bytes": item.bytes, "why": item.why} for item in found]
    print_rows(rows, given.json)
    # With --json the output is for a program, which cannot answer a question.
    if not found or (given.json and not given.yes):
        return DONE
    # Without a terminal nobody can confirm, so nothing is removed.
    if given.yes or (sys.stdin.isatty() and input("Remove these? [y/N] ").lower() == "y"):
        remove(found)
        print(f"removed {len(found)}", file=sys.stderr)
    else:
        print("bench: nothing was removed; `bench gc --yes` removes them", file=sys.stderr)
    return DONE


def table(given: list[str]) -> int:
    """`bench table NAME [KEY=VALUE ...] [-m]`."""
    from bench.reporting.tables.screen import print_table
    from bench.reporting.tables.writing import rows
    from bench.table import MissingInputs, make

    # The name may stand anywhere among the overrides, as Hydra allows for its own flags.
    named = [word for word in given if not word.startswith("-") and "=" not in word]
    if len(named) != 1:
        raise UserError(f"bench table takes one name, got {len(named)}: see `bench ls tables`")
    try:
        finished = make(named[0], [word for word in given if word != named[0]])
    except MissingInputs as error:
        for sentence in error.sentences:
            print(f"bench: {sentence}", file=sys.stderr)
        return WRONG
    if "--json" in given:
        print(json.dumps(rows(finished.table), indent=1, default=str))
    else:
        print_table(finished.table)
        print("wrote " + " ".join(map(str, finished.files)))
    for warning in dict.fromkeys(finished.launched.warnings):
        print(f"bench: {warning}", file=sys.stderr)
    for failure in finished.launched.failures:
        print(f"bench: failed: {failure}", file=sys.stderr)
    return FAILED if finished.launched.failures else DONE


def verify(given: argparse.Namespace) -> int:
    """`bench verify RUN`."""
    from bench.reporting.verdict import print_verdict
    from bench.verify import verify

    verdict = verify(given.run, given.results_dir, given.samples, given.tolerance)
    if given.json:
        print(json.dumps(verdict.plain(), indent=1))
    else:
        print_verdict(verdict)
    return DONE if verdict.agrees else FAILED


def export(given: argparse.Namespace) -> int:
    """`bench export RUN DIR`."""
    from bench.export import export

    form = export(given.run, given.folder, given.results_dir, pad=given.padded, onnx=given.onnx)
    print(f"wrote {given.folder} ({form}); its README.md says how to load it")
    return DONE


def prefetch(given: argparse.Namespace) -> int:
    """`bench prefetch KEY=VALUE ...`, or `bench prefetch TABLE ...`."""
    from bench.prefetch import prefetch
    from bench.table import runs_of

    named = [word for word in given.overrides if "=" not in word]
    rest = [word for word in given.overrides if word not in named]
    wanted = runs_of(named[0], rest) if named else [rest]
    # The runs of a table share models and data; each is reported once.
    said: set[str] = set()
    for line in (line for overrides in wanted for line in prefetch(overrides)):
        if line not in said:
            print(line)
            said.add(line)
    return DONE
