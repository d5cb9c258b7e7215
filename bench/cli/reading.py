"""The commands that read records or inspect the installation, and compute nothing."""

from __future__ import annotations

import argparse
import json
import sys

from bench.cli.answers import DONE, FAILED, print_rows
from bench.errors import unknown

LISTED = ("models", "methods", "benchmarks", "tables", "runs")


def ls(given: argparse.Namespace) -> int:
    """`bench ls WHAT`."""
    from bench.reporting import listing

    if given.what not in LISTED:
        raise unknown("list", given.what, LISTED)
    if given.what == "runs":
        rows = listing.runs(given.results_dir)
    else:
        rows = listing.configs(given.what.rstrip("s"))
    return print_rows(rows, given.json)


def show(given: argparse.Namespace) -> int:
    """`bench show RUN`."""
    from bench.records import Store
    from bench.reporting.show import print_record

    record = Store(given.results_dir).get(given.run)
    if given.command:
        print(record.command)
    elif given.json:
        print(record.model_dump_json(indent=1))
    else:
        print_record(record)
    return DONE


def compare(given: argparse.Namespace) -> int:
    """`bench compare RUN RUN ...`."""
    from bench.reporting.comparison import command

    found, flipped = command.compare_runs(
        given.runs, given.baseline, given.results_dir, flips=given.flips
    )
    pictures, lacking = command.pictures_of(found, flipped, given.results_dir)
    if given.json:
        print(json.dumps(command.plain(found, flipped, pictures), indent=1))
    else:
        command.print_comparison(found, flipped, pictures)
    if lacking:
        # To stderr, so that `--json` output stays parsable.
        print(lacking, file=sys.stderr)
    return DONE


def plot(given: argparse.Namespace) -> int:
    """`bench plot KIND [RUN ...]`."""
    from bench.reporting.plots import command

    asked = command.Asked(given.results_dir, given.task, given.cost, given.scope, given.knob)
    drawing = command.plot(given.kind, given.runs, asked)
    if given.json:
        return print_rows(drawing.rows(), as_json=True)
    for path in command.write(drawing, given.kind, given.output, given.results_dir):
        print(f"wrote {path}")
    return DONE


def report(given: argparse.Namespace) -> int:
    """`bench report`."""
    from bench.reporting.html import Share, write_report

    share = Share(per_run=given.samples, runs=given.samples_runs)
    written = write_report(given.results_dir, given.out, share)
    print(f"wrote {written.path} ({written})")
    if given.open:
        import webbrowser

        webbrowser.open(written.path.resolve().as_uri())
    return DONE


def track(given: argparse.Namespace) -> int:
    """`bench track [RUN ...]`."""
    from bench.records import Store
    from bench.reporting.projection import rebuild, resend

    store = Store(given.results_dir)
    if given.runs:
        sent = resend(store, [store.get(run) for run in given.runs])
    else:
        from bench.reporting.html import write_report
        from bench.reporting.tables.building import tables_of

        page, records = write_report(given.results_dir).path, store.all()
        # The overview in W&B holds the report page and the tables, which are built from all
        # records: it is only renewed when all are sent.
        sent = rebuild(store, records, page, tuple(tables_of(records)))
    failed = False
    # A generator: each record is sent as the loop reaches it, and a failed one does not stop the
    # rest.
    for what, warning in sent:
        print(f"bench: {warning}" if warning else f"sent {what}")
        failed = failed or warning is not None
    return FAILED if failed else DONE


def doctor(given: argparse.Namespace) -> int:
    """`bench doctor`."""
    from bench.doctor import examine

    return print_rows(examine(), given.json)
