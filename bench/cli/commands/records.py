"""Commands that only read records: ls, show, compare, plot, report, track.

Each command imports only its own part of `bench.reporting`, because matplotlib and pandas are slow
to import.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli.parser import LISTABLE
from bench.errors import EXIT_DONE, EXIT_FAILED, UserError, optional_module, unknown_name
from bench.ui import note, print_json, print_rows, print_text, warn

if TYPE_CHECKING:
    from bench.records import Record, Store


def ls(given: argparse.Namespace) -> int:
    """`bench ls WHAT`."""
    from bench.records import Store
    from bench.reporting import terminal_views

    if given.what not in LISTABLE:
        raise unknown_name("list", given.what, LISTABLE)
    if given.what == "runs":
        rows = terminal_views.list_runs(given.results_dir)
        if not given.json:
            rows = terminal_views.shown_runs(rows, Store(given.results_dir))
    else:
        rows = terminal_views.list_configs(given.what.rstrip("s"))
    return print_rows(rows, as_json=given.json)


def show(given: argparse.Namespace) -> int:
    """`bench show RUN`."""
    from bench.records import Store
    from bench.reporting.terminal_views import print_record

    store = Store(given.results_dir)
    record = store.get(given.run)
    if given.why is not None:
        from bench.runner.identity import identity_differences

        other = store.get(given.why)
        rows = identity_differences(record, other, shortened=not given.json)
        if not rows and not given.json:
            print(f"runs {record.id} and {other.id} do not differ in any part of their ids")
            return EXIT_DONE
        return print_rows(rows, as_json=given.json)
    if given.command:
        print_text(record.command)
    elif given.json:
        print_json(record.model_dump(mode="json"))
    else:
        print_record(record)
    return EXIT_DONE


def compare(given: argparse.Namespace) -> int:
    """`bench compare RUN RUN ...`."""
    from bench.reporting.comparison import named_runs, printer

    if given.seeds:
        return _compare_seeds(given)
    if not given.runs:
        raise UserError("compare needs runs to compare: bench compare RUN RUN")
    found, flipped = named_runs.compare_runs(
        given.runs, given.baseline, given.results_dir, flips=given.flips
    )
    images, missing = named_runs.flip_images(found, flipped, given.results_dir)
    if given.json:
        print_json(named_runs.comparison_json(found, flipped, images))
    else:
        printer.print_comparison(found, flipped, images)
    if missing:
        # To stderr, so that `--json` output stays parsable.
        note(missing)
    return EXIT_DONE


def _compare_seeds(given: argparse.Namespace) -> int:
    """`bench compare --seeds`."""
    from bench.records import Store
    from bench.reporting.comparison.seeds import comparable, compare_seeds, print_seeds

    store = Store(given.results_dir)
    if given.baseline is None:
        raise UserError("--seeds needs --baseline RUN: any run of the setting to compare with")
    baseline = store.get(given.baseline)
    named = map(store.get, given.runs)
    records = list(named) or [record for record in store.all() if comparable(record, baseline)]
    # By id, so that a run that is named twice counts once.
    found = compare_seeds(list({r.id: r for r in (baseline, *records)}.values()), baseline)
    if given.json:
        print_json([asdict(contrast) for contrast in found])
    else:
        print_seeds(found)
    return EXIT_DONE


def plot(given: argparse.Namespace) -> int:
    """`bench plot KIND [RUN ...]`."""
    from bench.reporting.plots import figures
    from bench.reporting.plots.style import check_figure_file

    request = figures.PlotRequest(
        given.results_dir, given.task, given.cost, given.scope, given.knob
    )
    if not given.json and given.kind in figures.PLOT_KINDS:
        for path in figures.figure_files(given.kind, given.output, given.results_dir):
            check_figure_file(path)
    drawing = figures.prepare_figure(given.kind, given.runs, request)
    if given.json:
        return print_rows(drawing.rows(), as_json=True)
    for path in figures.write_figures(drawing, given.kind, given.output, given.results_dir):
        print_text(f"wrote {path}")
    return EXIT_DONE


def report(given: argparse.Namespace) -> int:
    """`bench report`."""
    from bench.reporting.html import SampleShare, write_report

    share = SampleShare(per_run=given.samples, runs=given.sample_runs, images=given.images)
    written = write_report(given.results_dir, given.out, share)
    print_text(f"wrote {written.path} ({written})")
    if given.open:
        import webbrowser

        webbrowser.open(written.path.resolve().as_uri())
    return EXIT_DONE


def track(given: argparse.Namespace) -> int:
    """`bench track [RUN ...]`."""
    from bench.records import Store
    from bench.records.files import refuse_unwritable
    from bench.reporting.wandb_sync import sync_all, sync_runs, tracker_of
    from bench.tracking.tracker import track as send
    from bench.tracking.tracker import track_model
    from bench.tracking.workspace import EXTRA as WORKSPACE_EXTRA

    store = Store(given.results_dir)
    refuse_unwritable("--results-dir", store.root / "tracked", folder=True)
    runs = [word for word in given.runs if "=" not in word]
    entities = [_allowed_entity(word) for word in given.runs if "=" in word]
    if given.model is not None and len(runs) != 1:
        raise UserError(f"--model {given.model}: name the one RUN that was exported there")
    if given.workspace:
        if runs:
            raise UserError("--workspace is for a whole project: give no RUN with it")
        optional_module("wandb_workspaces", WORKSPACE_EXTRA)
    if given.model is not None:
        record = store.get(runs[0])
        config = tracker_of(record, entities)
        failed = send(record, store, config) or track_model(record, given.model, store, config)
        return _report_sent([(f"{record.id} and its model", failed)], store, [record])
    if runs:
        chosen = [store.get(run) for run in runs]
        return _report_sent(sync_runs(store, chosen, entities), store, chosen)
    from bench.reporting.html import SampleShare, write_report
    from bench.reporting.tables.builder import tables_of

    records = store.all()
    # The page contains samples of all runs and is sent as well.
    at_home = any(not record.config.get("tracker", {}).get("samples", True) for record in records)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html" if at_home else None
        share = SampleShare(runs=0) if at_home else None
        page = write_report(given.results_dir, out, share).path
        # The overview in W&B has the report page and the tables, which are built from all
        # records, so it is updated only if all are sent.
        tables = tuple(tables_of(records))
        sent = sync_all(store, records, page, tables, entities, workspace=given.workspace)
        return _report_sent(sent, store, records)


def _allowed_entity(word: str) -> str:
    key, _, name = word.partition("=")
    if key != "tracker.entity":
        raise UserError(f"{word}: only tracker.entity=NAME can be given, for records that name it")
    return name


def _report_sent(
    sent: Iterable[tuple[str, str | None]], store: Store, records: Sequence[Record]
) -> int:
    """Print which records were sent, and the errors of the others; return the exit code."""
    failed = False
    offline = _is_offline(records)
    # A generator, so that records are sent one by one and a failure does not stop the others.
    for what, warning in sent:
        if warning:
            warn(warning)
        else:
            print_text(f"{'kept' if offline else 'sent'} {what}")
        failed = failed or warning is not None
    if offline:
        place = store.root / "wandb_home" / "wandb"
        note(
            f"W&B is offline, so nothing has left this machine; to upload: wandb sync "
            f"{place}/offline-*"
        )
    return EXIT_FAILED if failed else EXIT_DONE


def _is_offline(records: Sequence[Record]) -> bool:
    """Return whether W&B writes files instead of sending, for all of these records."""
    from bench.reporting.wandb_sync import tracker_of
    from bench.tracking.wandb_run import wandb_mode

    modes = set()
    for record in records:
        with suppress(UserError):  # Reported when the record is sent.
            entity = record.config.get("tracker", {}).get("entity")
            modes.add(wandb_mode(tracker_of(record, [entity])))
    return modes == {"offline"}
