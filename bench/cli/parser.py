"""Command-line parser.

A command names its handler by a string, which is imported only when the command is used, because
importing all handlers would take most of the time of `bench --help`. Commands that read a results
folder have `--results-dir`; those that print rows have `--json`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

from bench.cli.arguments import (
    RESULTS_DIR_FLAG,
    folder,
    non_negative_integer,
    non_negative_number,
    positive_integer,
    results_dir_as_override,
)
from bench.errors import UserError

TRACEBACK_FLAG = "--traceback"
COMMANDS = (
    "run", "estimate", "table", "compare", "report", "plot", "ls", "show", "track", "verify",
    "rescore", "status", "resume", "gc", "export", "convert", "carve", "prefetch", "doctor",
    "trust",
)  # fmt: skip
LISTABLE = ("models", "methods", "benchmarks", "tables", "runs")
RAW_COMMANDS = {
    "run": "bench.cli.commands.run:run_command",
    "table": "bench.cli.commands.table:run_command",
}
"""Commands whose handlers parse their own arguments."""
PLOT_HELP = """\
draw figures of records (PNG, SVG, PDF); of all records if no RUN is given

  bench plot front --cost flops         accuracy against a cost, with the Pareto front
  bench plot curves --knob ratio        accuracy against a method's knob
  bench plot allocation RUN             heads, experts, groups or bits that each layer kept
  bench plot breakdown --cost flops     parts of a cost; --cost wall: phases of the run itself
  bench plot calibration                accuracy by confidence
  bench plot training                   loss and accuracy while a method trains
"""
RUN_HELP = """\
run one job: a model, methods, a benchmark; with -m, a sweep

  bench run model=micro_moe method=camera_p ratio=0.4
  bench run -m method=dense,camera_p,random_experts ratio=0.2,0.4,0.6
  bench run experiment=demo
  bench run sweep=camera_p_pareto          run a search; sweep=camera_p_grid is a grid
  bench run -m ratio=0.2,0.4 --budget 6h   do not start if this may take more than 6 hours
  bench run --cfg job                      print the composed config and run nothing

`bench ls models|methods|benchmarks` lists the values of these keys.
"""
ESTIMATE_HELP = """\
estimate time, memory, downloads and energy of a run or a sweep

  bench estimate model=qwen2_57b_a14b method=camera_p hardware=a100_40gb
  bench estimate -m method=dense,camera_p ratio=0.2,0.4 --budget 6h
  bench estimate --check           compare the estimates of all records with measured times

No weights are loaded. hardware=here (the default) measures this machine; hardware=NAME takes a
board of conf/hardware.
"""
TABLE_HELP = """\
rebuild a paper's table, with the published numbers next to ours

  bench table camera_main                       with the real models, on a GPU
  bench table camera_main scale=micro           with the embedded models, offline
  bench table visual_table2 "sections=[LLaVA-1.5-7B]" "rows=[original,FastV]" benchmark.batch_size=8
  bench table wgsef_grid scale=micro -m seed=1,2,3 hydra/launcher=joblib
  bench table smollm2 --page smollm2.md         write a page from existing records; run nothing
  bench ls tables                               list all tables
"""
CARVE_HELP = """\
divide a dense Llama into a mixture of experts, without training

  bench carve smollm2_carved model=SmolLM2-135M-Instruct.Q4_1.gguf calibration=wikitext2_words
  bench run model=smollm2_carved method=camera_p ratio=0.4
"""
RUN_WORDS = "a run id or a prefix of it, latest, or latest:METHOD"
ALLOWED_HELP = (
    "packages=[...], hydra.searchpath=[...] or model.trust_remote_code=true, to allow code of "
    "others to run, which a record cannot do; model.path=FOLDER, where the model's files are"
)
ENGINE_HELP = (
    "write a folder that this engine loads without slimbench: transformers, vllm or sglang"
)
AddCommand = Callable[[str, str, str], argparse.ArgumentParser]


class CommandParser(argparse.ArgumentParser):
    """argparse parser whose errors are raised as `UserError`.

    `results_dir=FOLDER` and `--results-dir FOLDER` are equivalent for every command.
    """

    takes_results_dir = False

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, without the usage text."""
        raise UserError(message)

    # The signature of argparse, whose stubs overload it.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the known arguments; return the others as well."""
        if args is not None and self.takes_results_dir:
            args = [re.sub(r"^results_dir=", "--results-dir=", word) for word in args]
        elif args is not None and any(action.dest == "overrides" for action in self._actions):
            args = results_dir_as_override(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; the overrides of a command may be anywhere among its options."""
        # argparse collects positional arguments only once, so those after an option are left over.
        parsed, rest = self.parse_known_args(args, namespace)
        places = [name for name in ("allowed", "overrides") if hasattr(parsed, name)]
        if any(word.startswith("-") for word in rest) or (rest and not places):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            setattr(parsed, places[0], [*getattr(parsed, places[0]), *rest])
        return parsed


class _PrintVersion(argparse.Action):
    """Print the version and exit."""

    # argparse's own action needs the version when the parser is built, and reading it is slow.
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"slimbench {version('slimbench')}")
        parser.exit()


def build_parser() -> CommandParser:
    """Return the parser of all commands.

    `handler` is the name of a function in `commands`, which takes the parsed arguments and returns
    the exit code.
    """
    top = CommandParser(
        prog="bench",
        description="Measure what model-compression methods cost and save.",
        epilog=f"Add {TRACEBACK_FLAG} to any command to see where an error comes from.",
    )
    top.add_argument("--version", action=_PrintVersion, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)

    def command(name: str, handler: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(handler=f"bench.cli.commands.{handler}")
        return added

    # In the order of `bench --help`.
    _add_run_commands(command)
    _add_sweep_commands(command)
    _add_check_commands(command)
    _add_model_commands(command)
    _add_record_commands(command)
    _add_plot_command(command)
    _add_report_command(command)
    _add_track_command(command)
    _add_installation_commands(command)
    return top


def _add_run_commands(command: AddCommand) -> None:
    """Add the commands that compute something, or say what it costs."""
    # `run` and `table` are added only for the help text: see `RAW_COMMANDS`.
    _add_words(command("run", "run:run_command", RUN_HELP), "overrides", "KEY=VALUE")
    estimate = command("estimate", "estimate:run_command", ESTIMATE_HELP)
    _add_words(estimate, "overrides", "KEY=VALUE")
    estimate.add_argument("-m", "--multirun", action="store_true", help="estimate a sweep")
    estimate.add_argument(
        "--budget", metavar="TIME", help="fail if it may take longer, such as 30min or 6h"
    )
    estimate.add_argument(
        "--check", action="store_true", help="compare estimates with measured times"
    )
    _add_json_flag(estimate)
    tables = command("table", "table:run_command", TABLE_HELP)
    tables.add_argument("name", metavar="NAME")
    _add_words(tables, "overrides", "KEY=VALUE")
    tables.add_argument("--json", action="store_true", help="print the cells as JSON")
    tables.add_argument(
        "--page", type=Path, metavar="FILE.md", help="write a page from existing records"
    )


def _add_sweep_commands(command: AddCommand) -> None:
    """Add the commands on sweeps and on what they leave."""
    status = command(
        "status", "sweeps:status", "show the state of all sweeps, or of each job of one"
    )
    status.add_argument("sweep", nargs="?", metavar="SWEEP", help="the name of a sweep, or latest")
    resume = command("resume", "sweeps:resume", "run the missing and failed jobs of a sweep")
    resume.add_argument("sweep", metavar="SWEEP", help="the name of a sweep, or latest")
    _add_allowed(
        resume, "an argument of the sweep that a stored plan cannot allow, such as packages=[...]"
    )
    garbage = command("gc", "gc:run_command", "delete files that nothing refers to, after asking")
    garbage.add_argument("--yes", action="store_true", help="do not ask")
    for added in (status, resume, garbage):
        _add_results_dir(added)
    for added in (status, garbage):
        _add_json_flag(added)


def _add_check_commands(command: AddCommand) -> None:
    """Add the commands that compute the results of a record again."""
    verify = command(
        "verify", "verify:run_command", "repeat a part of a run and compare the results"
    )
    verify.add_argument("run", metavar="RUN", help=RUN_WORDS)
    verify.add_argument(
        "--samples", type=int, default=20, metavar="N", help="number of samples per task (20)"
    )
    verify.add_argument(
        "--tolerance", type=non_negative_number, default=None, help="allowed relative difference"
    )
    _add_allowed(verify, ALLOWED_HELP)
    rescore = command(
        "rescore", "rescore:run_command", "apply the harness's current metrics to stored answers"
    )
    rescore.add_argument("run", metavar="RUN", help=RUN_WORDS)
    _add_allowed(rescore, ALLOWED_HELP)
    for added in (verify, rescore):
        _add_results_dir(added)
        _add_json_flag(added)


def _add_model_commands(command: AddCommand) -> None:
    """Add the commands that write or download models."""
    export = command(
        "export", "export:run_command", "write the model of a run as a Hugging Face folder"
    )
    export.add_argument("run", metavar="RUN", help=RUN_WORDS)
    export.add_argument("folder", type=Path, metavar="DIR", help="the new folder to write")
    export.add_argument("--for", dest="engine", metavar="ENGINE", help=ENGINE_HELP)
    export.add_argument(
        "--align", type=int, metavar="N", help="make widths a multiple of N: 64 or 128"
    )
    export.add_argument("--onnx", action="store_true", help="also write a classifier as ONNX")
    _add_allowed(export, ALLOWED_HELP)
    _add_results_dir(export)
    convert = command(
        "convert",
        "conversion:convert",
        "convert a LLaVA checkpoint from the old layout for transformers",
    )
    convert.add_argument(
        "source", type=Path, metavar="FOLDER", help="the checkpoint in LLaVA's own layout"
    )
    convert.add_argument("folder", type=Path, metavar="DIR", help="the new folder to write")
    convert.add_argument("--tower", type=Path, required=True, help="the folder of its CLIP model")
    carve = command("carve", "conversion:carve", CARVE_HELP)
    carve.add_argument("folder", type=Path, metavar="DIR", help="the new folder to write")
    _add_words(carve, "overrides", "KEY=VALUE", "model and calibration, as for a run")
    for option, number, words in (
        ("--experts", 16, "routed experts per layer"),
        ("--shared", 8, "width of the shared expert, as a number of experts"),
        ("--chosen", 14, "routed experts per token"),
    ):
        carve.add_argument(
            option, type=positive_integer, default=number, metavar="N", help=f"{words} ({number})"
        )
    prefetch = command("prefetch", "prefetch:run_command", "download what a run or a table needs")
    _add_words(prefetch, "overrides", "TABLE|KEY=VALUE")


def _add_record_commands(command: AddCommand) -> None:
    """Add the commands that print records."""
    listing = command("ls", "records:ls", "list models, methods, benchmarks, tables or runs")
    listing.add_argument("what", metavar="|".join(LISTABLE))
    show = command("show", "records:show", "show one record: its metrics, costs and command")
    show.add_argument("run", metavar="RUN", help=RUN_WORDS)
    show.add_argument(
        "--command", action="store_true", help="print only the command that repeats the run"
    )
    show.add_argument("--why", metavar="OTHER", help="show only why OTHER has a different id")
    compare = command(
        "compare", "records:compare", "compare runs with paired statistics over shared samples"
    )
    _add_words(compare, "runs", "RUN", RUN_WORDS)
    compare.add_argument(
        "--baseline", metavar="RUN", help="the run to compare with (default: the dense run)"
    )
    compare.add_argument(
        "--seeds",
        action="store_true",
        help="compare settings over paired seeds, of the named runs or of all",
    )
    compare.add_argument(
        "--flips",
        type=non_negative_integer,
        default=0,
        metavar="N",
        help="show N samples that became wrong, and N that became right",
    )
    for added in (listing, show, compare):
        _add_results_dir(added)
        _add_json_flag(added)


def _add_plot_command(command: AddCommand) -> None:
    """Add the command that draws figures of records."""
    plot = command("plot", "records:plot", PLOT_HELP)
    plot.add_argument("kind", metavar="KIND", help="the kind of figure, as above")
    _add_words(plot, "runs", "RUN", RUN_WORDS)
    plot.add_argument(
        "--task", default="average", help="the task whose headline metric is shown (average)"
    )
    plot.add_argument(
        "--cost", default="flops", help="the cost to show, such as flops, seconds or bytes (flops)"
    )
    plot.add_argument("--scope", help="the scope of the cost, as `bench show` prints it")
    plot.add_argument(
        "--knob",
        default="ratio",
        help="the knob to show, such as ratio, camera_p.alpha or calibration.rows (ratio)",
    )
    plot.add_argument(
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the file to write, .png, .svg or .pdf; can be repeated",
    )
    _add_results_dir(plot)
    _add_json_flag(plot)


def _add_report_command(command: AddCommand) -> None:
    """Add the command that shows records as a page of HTML."""
    report = command("report", "records:report", "write one HTML file with all records")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (default: RESULTS_DIR/report.html)",
    )
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.add_argument(
        "--samples",
        type=non_negative_integer,
        default=40,
        metavar="N",
        help="samples to include per run (40)",
    )
    report.add_argument(
        "--sample-runs",
        type=non_negative_integer,
        default=200,
        metavar="N",
        help="include samples of the N newest runs (200)",
    )
    report.add_argument(
        "--images", action="store_true", help="include thumbnails of these samples' images"
    )
    _add_results_dir(report)


def _add_track_command(command: AddCommand) -> None:
    """Add the command that sends records to W&B."""
    track = command(
        "track",
        "records:track",
        "upload records to W&B again; without RUN, upload all and an overview",
    )
    _add_words(track, "runs", "RUN", "a run, or tracker.entity=NAME for records that name it")
    track.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="also upload the exported model of RUN (one run only)",
    )
    track.add_argument(
        "--workspace",
        action="store_true",
        help="save a W&B workspace that opens on score against cost (only without RUN)",
    )
    _add_results_dir(track)


def _add_installation_commands(command: AddCommand) -> None:
    """Add the commands on this installation and on what it may run."""
    doctor = command(
        "doctor", "doctor:run_command", "show installed packages, devices, and what works offline"
    )
    _add_json_flag(doctor)
    consent = command(
        "trust", "trust:run_command", "allow the packages and configs of a project file to run"
    )
    consent.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="the project file (default: the nearest slimbench.toml)",
    )
    consent.add_argument("--yes", action="store_true", help="do not ask")


def _add_words(
    added: argparse.ArgumentParser, name: str, metavar: str, text: str | None = None
) -> None:
    added.add_argument(name, nargs="*", default=[], metavar=metavar, help=text)


def _add_allowed(added: argparse.ArgumentParser, text: str) -> None:
    """Add the overrides with which the user allows code that a stored file needs."""
    _add_words(added, "allowed", "KEY=VALUE", text)


def _add_results_dir(added: argparse.ArgumentParser) -> None:
    cast(CommandParser, added).takes_results_dir = True
    added.add_argument(
        RESULTS_DIR_FLAG,
        type=folder,
        default=Path("results"),
        metavar="FOLDER",
        help="where the records are (results)",
    )


def _add_json_flag(added: argparse.ArgumentParser) -> None:
    added.add_argument("--json", action="store_true", help="print JSON")
