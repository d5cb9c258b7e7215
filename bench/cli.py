"""The command line. Starts at once: what a command needs is imported when it is called.

Exit codes: 0 done; 1 some runs failed; 2 the user's input is wrong; 75 interrupted, run the same
command again to go on.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from bench.errors import RunsFailed, Stopped, UserError, unknown
from bench.secrets import hide

if TYPE_CHECKING:
    from bench.launch import Launched

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75
COMMANDS = (
    "run", "table", "compare", "report", "plot", "ls", "show", "track", "verify", "status",
    "resume", "gc", "export", "prefetch", "doctor",
)  # fmt: skip
LISTED = ("models", "methods", "benchmarks", "tables", "runs")

PLOT_HELP = """\
figures of records as PNG, SVG and PDF; without RUN, of all of them

  bench plot front --cost flops         accuracy against a cost, and the Pareto front
  bench plot curves --knob ratio        accuracy against a knob
  bench plot allocation RUN             what was left where: heads, experts, groups, bits
  bench plot breakdown --cost flops     what a cost is made of; --cost wall: of the run itself
  bench plot calibration                how often answers are right that are so sure
  bench plot training                   losses and accuracies while a method trains
"""

RUN_HELP = """\
run a model, methods and a benchmark; -m sweeps

  bench run model=micro_moe method=camera_p ratio=0.4
  bench run -m method=dense,camera_p,random_experts ratio=0.2,0.4,0.6
  bench run experiment=demo
  bench run sweep=camera_p_pareto  a search; bench run sweep=camera_p_grid, a grid
  bench run --cfg job              the composed config, without running it
"""

TABLE_HELP = """\
a paper's table: run what is missing, show ours beside theirs

  bench table camera_main                       the real models, on a GPU
  bench table camera_main scale=micro           the embedded models stand in, offline
  bench table visual_table2 "blocks=[LLaVA-1.5-7B]" "rows=[original,FastV]" benchmark.batch_size=8
  bench table wgsef_grid scale=micro -m seed=1,2,3 hydra/launcher=joblib
  bench ls tables                               which there are
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for asked in (signal.SIGTERM, signal.SIGUSR1):  # what schedulers send before they kill
        signal.signal(asked, _interrupt)
    try:
        if given[:1] == ["run"] and not {"-h", "--help"} & set(given):
            return _run(given[1:])
        if given[:1] == ["table"] and not {"-h", "--help"} & set(given):
            return _table_command(given[1:])
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown("command", given[0], COMMANDS)
        parsed = _parser().parse_args(given)
        handler: Callable[[argparse.Namespace], int] = parsed.handler
        return handler(parsed)
    except UserError as error:
        print(f"bench: {hide(str(error))}", file=sys.stderr)
        return WRONG
    except RunsFailed as error:
        for reason in error.reasons:
            print(f"bench: failed: {hide(reason)}", file=sys.stderr)
        return FAILED
    except Stopped as error:
        print(f"bench: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on where this stopped", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # how argparse and Hydra end after an answer or a complaint
        return DONE if error.code in (0, None) else WRONG
    except Exception as error:  # a fault of ours or of a method: one sentence, details in a file
        print(f"bench: failed: {_keep_trace(error)}", file=sys.stderr)
        return FAILED


def _keep_trace(error: Exception) -> str:
    """Leave the traceback in a file, without secrets, and say in one sentence what went wrong."""
    import tempfile
    import traceback

    said = (str(error) or "no message").splitlines()[0]
    with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as file:
        file.write(hide("".join(traceback.format_exception(error))))
    return hide(f"{type(error).__name__}: {said} (details: {file.name})")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are user errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Say in one sentence what is wrong, without the usage text."""
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bench", description="Compression methods, measured honestly.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str, handler: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(handler=handler)
        return added

    command("run", lambda given: _run(given.overrides), RUN_HELP).add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE"
    )
    tables = command("table", lambda given: _table_command([given.name]), TABLE_HELP)
    tables.add_argument("name", metavar="NAME")
    tables.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    tables.add_argument("--json", action="store_true", help="print its cells as JSON")
    status = command("status", _status, "the state of all sweeps, or every job of one")
    status.add_argument("sweep", nargs="?", metavar="SWEEP", help="a sweep's name, or latest")
    resume = command("resume", _resume, "run what is missing or has failed in a sweep")
    resume.add_argument("sweep", metavar="SWEEP", help="a sweep's name, or latest")
    garbage = command("gc", _gc, "remove files that nothing refers to, after asking")
    garbage.add_argument("--yes", action="store_true", help="do not ask")
    listing = command("ls", _ls, "list models, methods, benchmarks, tables or runs")
    listing.add_argument("what", metavar="|".join(LISTED))
    show = command("show", _show, "show one record")
    show.add_argument("run", metavar="RUN", help="a run's id or the beginning of it")
    show.add_argument("--command", action="store_true", help="only the command that repeats it")
    compare = command("compare", _compare, "paired statistics between runs, sample by sample")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.add_argument("--baseline", metavar="RUN", help="what to compare with (the dense run)")
    compare.add_argument(
        "--flips", type=int, default=0, metavar="N", help="show N samples each way"
    )
    plot = command("plot", _plot, PLOT_HELP)
    plot.add_argument("kind", metavar="KIND")
    plot.add_argument("runs", nargs="*", metavar="RUN")
    plot.add_argument("--task", default="average", help="the headline to show (average)")
    plot.add_argument("--cost", default="flops", help="flops, seconds, bytes, ... (flops)")
    plot.add_argument("--scope", help="which cost of that name, as `bench show` lists it")
    plot.add_argument("--knob", default="ratio", help="a method's knob or a config key (ratio)")
    plot.add_argument("--output", type=Path, action="append", default=[], metavar="FILE")
    report = command("report", _report, "write one HTML file over all records")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RESULTS_DIR/report.html")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.add_argument("--samples", type=_count, default=40, metavar="N", help="a run; 40")
    report.add_argument(
        "--samples-runs",
        type=_count,
        default=200,
        metavar="N",
        help="newest runs with samples; 200",
    )
    track = command("track", _track, "send records to W&B (again); no RUN: all, and an overview")
    track.add_argument("runs", nargs="*", metavar="RUN")
    verify = command("verify", _verify, "repeat a part of a run and say whether it agrees")
    verify.add_argument("run", metavar="RUN", help="a run's id or the beginning of it")
    verify.add_argument("--samples", type=int, default=20, metavar="N", help="of each task")
    verify.add_argument("--tolerance", type=float, default=None, help="share of a number")
    export = command("export", _export, "write the model of a run as a folder")
    export.add_argument("run", metavar="RUN", help="a run's id or the beginning of it")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--padded", action="store_true", help="zeros so that transformers loads it")
    export.add_argument("--onnx", action="store_true", help="an image classifier as ONNX as well")
    prefetch = command("prefetch", _prefetch, "download what a run needs, for use offline")
    prefetch.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    doctor = command("doctor", _doctor, "what is installed, which devices, what works offline")
    for added in (
        status,
        resume,
        garbage,
        listing,
        show,
        compare,
        plot,
        report,
        verify,
        track,
        export,
    ):
        added.add_argument("--results-dir", type=Path, default=Path("results"))
    for added in (status, garbage, listing, show, compare, plot, verify, doctor):
        added.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    """A number of things, for an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of things, such as 0 or 40")
    return int(text)


def _run(overrides: list[str]) -> int:
    """`bench run`: Hydra's own flags (-m, --cfg, --info) are Hydra's to answer."""
    if {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"} & set(overrides):
        from bench.launch import ask_hydra

        ask_hydra(overrides)
        return DONE
    from bench.run import start

    return _came(start(overrides))


def _came(outcome: Launched) -> int:
    """Print what came of a run, a sweep or a search."""
    from bench.evaluation.ranks import joined
    from bench.reporting.search import print_search
    from bench.reporting.summary import print_summary

    if not joined().is_first:  # of several processes one speaks
        return FAILED if outcome.failures else DONE
    if outcome.searched is not None:
        print_search(outcome.searched)
    else:
        print_summary(outcome.records, reused=outcome.reused)
    for warning in dict.fromkeys(outcome.warnings):
        print(f"bench: {hide(warning)}", file=sys.stderr)
    for failure in outcome.failures:
        print(f"bench: failed: {hide(failure)}", file=sys.stderr)
    return FAILED if outcome.failures else DONE


def _status(given: argparse.Namespace) -> int:
    from bench.sweep.plan import every, find
    from bench.sweep.state import summary, table

    if given.sweep is None:
        return _table([summary(plan) for plan in every(given.results_dir)], given.json)
    return _table(table(find(given.results_dir, given.sweep)), given.json)


def _resume(given: argparse.Namespace) -> int:
    from bench.run import go_on

    return _came(go_on(given.results_dir, given.sweep))


def _gc(given: argparse.Namespace) -> int:
    from bench.garbage import find, remove

    found = find(given.results_dir)
    rows = [{"path": str(item.path), "bytes": item.bytes, "why": item.why} for item in found]
    _table(rows, given.json)
    if not found or (given.json and not given.yes):
        return DONE
    if given.yes or (sys.stdin.isatty() and input("Remove these? [y/N] ").lower() == "y"):
        remove(found)
        print(f"removed {len(found)}", file=sys.stderr)
    else:
        print("bench: nothing was removed; bench gc --yes removes these", file=sys.stderr)
    return DONE


def _table_command(given: list[str]) -> int:
    """`bench table NAME [KEY=VALUE ...] [-m]`."""
    from bench.reporting.tables.screen import print_table
    from bench.reporting.tables.writing import rows
    from bench.table import MissingInputs, make

    named = [word for word in given if not word.startswith("-") and "=" not in word]
    if len(named) != 1:
        raise UserError(f"bench table takes one name, not {len(named)}: see `bench ls tables`")
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


def _ls(given: argparse.Namespace) -> int:
    from bench.reporting import listing

    if given.what not in LISTED:
        raise unknown("list", given.what, LISTED)
    if given.what == "runs":
        rows = listing.runs(given.results_dir)
    else:
        rows = listing.configs(given.what.rstrip("s"))
    return _table(rows, given.json)


def _show(given: argparse.Namespace) -> int:
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


def _compare(given: argparse.Namespace) -> int:
    from bench.reporting.comparison import command

    found, flipped = command.compare_runs(
        given.runs, given.baseline, given.results_dir, flips=given.flips
    )
    if given.json:
        print(json.dumps(command.plain(found, flipped), indent=1))
    else:
        command.print_comparison(found, flipped)
    return DONE


def _plot(given: argparse.Namespace) -> int:
    from bench.reporting.plots import command

    asked = command.Asked(given.results_dir, given.task, given.cost, given.scope, given.knob)
    drawing = command.plot(given.kind, given.runs, asked)
    if given.json:
        return _table(drawing.rows(), as_json=True)
    for path in command.write(drawing, given.kind, given.output, given.results_dir):
        print(f"wrote {path}")
    return DONE


def _report(given: argparse.Namespace) -> int:
    from bench.reporting.html import Share, write_report

    share = Share(per_run=given.samples, runs=given.samples_runs)
    written = write_report(given.results_dir, given.out, share)
    print(f"wrote {written.path} ({written})")
    if given.open:
        import webbrowser

        webbrowser.open(written.path.resolve().as_uri())
    return DONE


def _verify(given: argparse.Namespace) -> int:
    from bench.reporting.verdict import print_verdict
    from bench.verify import verify

    verdict = verify(given.run, given.results_dir, given.samples, given.tolerance)
    if given.json:
        print(json.dumps(verdict.plain(), indent=1))
    else:
        print_verdict(verdict)
    return DONE if verdict.agrees else FAILED


def _track(given: argparse.Namespace) -> int:
    from bench.records import Store
    from bench.reporting.projection import rebuild, resend

    store = Store(given.results_dir)
    if given.runs:
        sent = resend(store, [store.get(run) for run in given.runs])
    else:
        from bench.reporting.html import write_report

        page = write_report(given.results_dir).path
        sent = rebuild(store, store.all(), page)
    failed = False
    for what, warning in sent:
        print(f"bench: {warning}" if warning else f"sent {what}")
        failed = failed or warning is not None
    return FAILED if failed else DONE


def _export(given: argparse.Namespace) -> int:
    from bench.export import export

    form = export(given.run, given.folder, given.results_dir, pad=given.padded, onnx=given.onnx)
    print(f"wrote {given.folder} ({form}); its README.md says how to load it")
    return DONE


def _prefetch(given: argparse.Namespace) -> int:
    from bench.prefetch import prefetch

    for line in prefetch(given.overrides):
        print(line)
    return DONE


def _doctor(given: argparse.Namespace) -> int:
    from bench.doctor import examine

    return _table(examine(), given.json)


def _table(rows: list[dict[str, Any]], as_json: bool) -> int:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return DONE
    from bench.reporting.terminal import print_rows

    print_rows(rows)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
