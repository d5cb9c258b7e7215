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
from typing import Any, NoReturn

from bench.errors import RunsFailed, Stopped, UserError, unknown

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75
COMMANDS = ("run", "ls", "show", "track", "export", "prefetch", "doctor")
LISTED = ("models", "methods", "benchmarks", "runs")

RUN_HELP = """\
run a model, methods and a benchmark; -m sweeps

  bench run model=micro_moe method=camera_p ratio=0.4
  bench run -m method=dense,camera_p,random_experts ratio=0.2,0.4,0.6
  bench run experiment=demo
  bench run --cfg job              the composed config, without running it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for asked in (signal.SIGTERM, signal.SIGUSR1):  # what schedulers send before they kill
        signal.signal(asked, _interrupt)
    try:
        if given[:1] == ["run"] and not {"-h", "--help"} & set(given):
            return _run(given[1:])
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown("command", given[0], COMMANDS)
        parsed = _parser().parse_args(given)
        handler: Callable[[argparse.Namespace], int] = parsed.handler
        return handler(parsed)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return WRONG
    except RunsFailed as error:
        for reason in error.reasons:
            print(f"bench: failed: {reason}", file=sys.stderr)
        return FAILED
    except Stopped as error:
        print(f"bench: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on where this stopped", file=sys.stderr)
        return INTERRUPTED


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
    listing = command("ls", _ls, "list models, methods, benchmarks or runs")
    listing.add_argument("what", metavar="|".join(LISTED))
    show = command("show", _show, "show one record")
    show.add_argument("run", metavar="RUN", help="a run's id or the beginning of it")
    show.add_argument("--command", action="store_true", help="only the command that repeats it")
    track = command("track", _track, "send records to W&B (again)")
    track.add_argument("runs", nargs="+", metavar="RUN")
    export = command("export", _export, "write the model of a run as a folder")
    export.add_argument("run", metavar="RUN", help="a run's id or the beginning of it")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--padded", action="store_true", help="zeros so that transformers loads it")
    export.add_argument("--onnx", action="store_true", help="an image classifier as ONNX as well")
    prefetch = command("prefetch", _prefetch, "download what a run needs, for use offline")
    prefetch.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    doctor = command("doctor", _doctor, "what is installed, which devices, what works offline")
    for added in (listing, show, track, export):
        added.add_argument("--results-dir", type=Path, default=Path("results"))
    for added in (listing, show, doctor):
        added.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _run(overrides: list[str]) -> int:
    """`bench run`: Hydra's own flags (-m, --cfg, --info) are Hydra's to answer."""
    if {"--cfg", "-c", "--info", "-i", "--hydra-help", "--version"} & set(overrides):
        from bench.launch import ask_hydra

        ask_hydra(overrides)
        return DONE
    from bench.evaluation.ranks import joined
    from bench.reporting.summary import print_summary
    from bench.run import start

    outcome = start(overrides)
    if not joined().is_first:  # of several processes one speaks
        return FAILED if outcome.failures else DONE
    print_summary(outcome.records, reused=outcome.reused)
    for warning in dict.fromkeys(outcome.warnings):
        print(f"bench: {warning}", file=sys.stderr)
    for failure in outcome.failures:
        print(f"bench: failed: {failure}", file=sys.stderr)
    return FAILED if outcome.failures else DONE


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


def _track(given: argparse.Namespace) -> int:
    from bench.records import Store
    from bench.tracking import TrackerConfig, track

    store = Store(given.results_dir)
    records = [store.get(run) for run in given.runs]
    failed = False
    for record in records:
        config = TrackerConfig(**{**record.config["tracker"], "kind": "wandb"})
        warning = track(record, store, config)
        print(f"bench: {warning}" if warning else f"sent {record.id}")
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
