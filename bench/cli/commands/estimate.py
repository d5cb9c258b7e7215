"""`bench estimate`: the cost of a run or sweep in advance, and the accuracy of past estimates."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench.errors import EXIT_DONE, UserError
from bench.estimation.boards import load_hardware
from bench.estimation.hardware import HERE
from bench.estimation.run_estimate import SweepEstimate
from bench.estimation.words import notes, phase_rows, sweep_line, time_range
from bench.runner.estimate import estimate_runs, read_budget, refuse_above
from bench.runner.session import Session
from bench.ui import print_json, print_rows, print_text

KEY = "hardware="


def run_command(given: argparse.Namespace) -> int:
    """`bench estimate KEY=VALUE ... [-m] [hardware=NAME] [--budget 6h] [--json] [--check]`."""
    if given.check:
        return _check(given.overrides, as_json=given.json)
    # First, so that an invalid budget is refused before anything is composed.
    budget = None if given.budget is None else read_budget(given.budget)
    names = [word.removeprefix(KEY) for word in given.overrides if word.startswith(KEY)]
    if len(names) > 1:
        raise UserError(f"hardware is given {len(names)} times: name one board")
    hardware = None if names in ([], [HERE]) else load_hardware(names[0])
    overrides = [word for word in given.overrides if not word.startswith(KEY)]
    with Session(freezes=True) as session:
        found = estimate_runs([*(["-m"] if given.multirun else []), *overrides], hardware, session)
    if given.json:
        print_json(found.as_json())
    else:
        _show(found)
    if budget is not None:
        refuse_above(budget, found)
    return EXIT_DONE


def _show(estimate: SweepEstimate) -> None:
    if len(estimate.runs) > 1:
        print_rows(list(_run_rows(estimate)))
        print_text(sweep_line(estimate))
        gaps = dict.fromkeys(gap for run in estimate.runs for gap in run.missing)
        for gap in gaps:
            print_text(f"missing: {gap}")
        return
    (run,) = estimate.runs
    print_rows(list(phase_rows(run)))
    for line in notes(run):
        print_text(line)
    if run.state == "recorded":
        print_text("recorded already: running it again takes no time")


def _run_rows(estimate: SweepEstimate) -> Iterator[dict[str, object]]:
    for run in estimate.runs:
        yield {
            "run": run.name,
            "time": time_range(run.low, run.high),
            "fits": "yes" if run.fits else "no",
            "state": run.state,
        }


def _check(overrides: list[str], *, as_json: bool) -> int:
    """Print, per kind of phase, how often the measured time was within the estimated bounds."""
    from bench.estimation.accuracy import accuracy_rows
    from bench.records import Store

    folders = [w.removeprefix("results_dir=") for w in overrides if w.startswith("results_dir=")]
    if len(folders) != len(overrides) or len(folders) > 1:
        raise UserError("bench estimate --check takes results_dir=FOLDER and nothing else")
    folder = Path(folders[0] if folders else "results")
    if not folder.is_dir():
        raise UserError(f"results_dir={folder}: no such folder, so there are no records")
    rows = accuracy_rows(Store(folder).all())
    if not rows and not as_json:
        print_text("no record has an estimate next to its measured phases")
        return EXIT_DONE
    return print_rows(rows, as_json=as_json)
