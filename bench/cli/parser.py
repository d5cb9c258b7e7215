"""Command-line parser.

A command names its handler by string, and the handler is imported only when its command is given:
importing all of them would take most of the time of `bench --help`. Commands that read a results
folder take `--results-dir`; those that print rows take `--json`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from bench.errors import UserError, refuse_unclear_folder

TRACEBACK_FLAG = "--traceback"
RESULTS_DIR_FLAG = "--results-dir"
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
"""Commands whose handlers read their arguments themselves."""
PLOT_HELP = """\
figures of records, of all without RUN: PNG, SVG, PDF

  bench plot front --cost flops         accuracy against a cost, and the Pareto front
  bench plot curves --knob ratio        accuracy against a knob
  bench plot allocation RUN             what each layer kept: heads, experts, groups, bits
  bench plot breakdown --cost flops     parts of a cost; --cost wall: phases of the run itself
  bench plot calibration                accuracy by confidence
  bench plot training                   losses and accuracies while a method trains
"""
RUN_HELP = """\
run a model, methods and a benchmark; -m sweeps

  bench run model=micro_moe method=camera_p ratio=0.4
  bench run -m method=dense,camera_p,random_experts ratio=0.2,0.4,0.6
  bench run experiment=demo
  bench run sweep=camera_p_pareto  a search; sweep=camera_p_grid is a grid
  bench run -m ratio=0.2,0.4 --budget 6h   refuse what may take longer
  bench run --cfg job              print the composed config, run nothing
"""
ESTIMATE_HELP = """\
time, memory, downloads and energy of a run or a sweep, before it runs

  bench estimate model=qwen2_57b_a14b method=camera_p hardware=a100_40gb
  bench estimate -m method=dense,camera_p ratio=0.2,0.4 --budget 6h
  bench estimate --check           how good the estimates of all records were

hardware: here, or one of conf/hardware; no weight is loaded
"""
TABLE_HELP = """\
a paper's table: run what is missing, show our numbers next to the published ones

  bench table camera_main                       the real models, on a GPU
  bench table camera_main scale=micro           with the embedded models, offline
  bench table visual_table2 "sections=[LLaVA-1.5-7B]" "rows=[original,FastV]" benchmark.batch_size=8
  bench table wgsef_grid scale=micro -m seed=1,2,3 hydra/launcher=joblib
  bench table smollm2 --page smollm2.md         a page of the records there are; runs nothing
  bench ls tables                               list all tables
"""
CARVE_HELP = """\
a dense Llama as a mixture of experts, without training

  bench carve smollm2_carved model=SmolLM2-135M-Instruct.Q4_1.gguf calibration=wikitext2_words
  bench run model=smollm2_carved method=camera_p ratio=0.4
"""
RUN_WORDS = "a run id or a prefix of it; latest, or latest:METHOD"
ALLOWED_HELP = (
    "packages=[...], hydra.searchpath=[...], model.trust_remote_code=true: code of others that may "
    "run, which no record can allow; model.path=FOLDER: the model's files on this machine"
)
ENGINE_HELP = "transformers, vllm or sglang, which then loads it without slimbench"
AddCommand = Callable[[str, str, str], argparse.ArgumentParser]


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are raised as `UserError`, like all others.

    `results_dir=FOLDER` and `--results-dir FOLDER` mean the same for every command.
    """

    takes_results_dir = False

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, without the usage text."""
        raise UserError(message)

    # The signature of argparse, whose stubs overload it.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments as far as they are known."""
        if args is not None and self.takes_results_dir:
            args = [re.sub(r"^results_dir=", "--results-dir=", word) for word in args]
        elif args is not None and any(action.dest == "overrides" for action in self._actions):
            args = results_dir_as_override(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, with the overrides of a command anywhere among its options."""
        # argparse fills a list of positionals once, so those after an option are left over.
        parsed, rest = self.parse_known_args(args, namespace)
        places = [name for name in ("allowed", "overrides") if hasattr(parsed, name)]
        if any(word.startswith("-") for word in rest) or (rest and not places):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            setattr(parsed, places[0], [*getattr(parsed, places[0]), *rest])
        return parsed


def results_dir_as_override(words: Sequence[str]) -> list[str]:
    """Return the words with `--results-dir FOLDER` as the override that it means."""
    found, rest = list[str](), iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != RESULTS_DIR_FLAG:
            found.append(word)
            continue
        folder = value if equals else next(rest, "")
        found.append(f"results_dir={folder}")
    return found


class _PrintVersion(argparse.Action):
    """Print the version and exit."""

    # argparse's own action takes a text, and to read it takes as long as building the parser.
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"slimbench {version('slimbench')}")
        parser.exit()


def build_parser() -> CommandParser:
    """Return the parser of all commands; `handler` is the name of a function below `commands`.

    The function takes the parsed arguments and returns the exit code.
    """
    top = CommandParser(
        prog="bench",
        description="Benchmark model-compression methods.",
        epilog=f"{TRACEBACK_FLAG} with any command shows where an error came from.",
    )
    top.add_argument("--version", action=_PrintVersion, nargs=0, help="show the version")
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

    _add_run_commands(command)
    _add_record_commands(command)
    return top


def _add_run_commands(command: AddCommand) -> None:
    """Add the commands that compute something."""
    # Only for the help text and the list of commands: see `RAW_COMMANDS`.
    command("run", "run:run_command", RUN_HELP).add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE"
    )
    estimate = command("estimate", "estimate:run_command", ESTIMATE_HELP)
    estimate.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    estimate.add_argument("-m", "--multirun", action="store_true", help="a sweep")
    estimate.add_argument("--budget", metavar="TIME", help="refuse what may take longer: 30min, 6h")
    estimate.add_argument("--check", action="store_true", help="compare with what was measured")
    estimate.add_argument("--json", action="store_true", help="print JSON")
    tables = command("table", "table:run_command", TABLE_HELP)
    tables.add_argument("name", metavar="NAME")
    tables.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    tables.add_argument("--json", action="store_true", help="print the cells as JSON")
    tables.add_argument("--page", type=Path, metavar="FILE.md", help="write a page of the records")
    status = command("status", "sweeps:status", "the state of all sweeps, or of each job of one")
    status.add_argument("sweep", nargs="?", metavar="SWEEP", help="a sweep's name, or latest")
    resume = command("resume", "sweeps:resume", "run the missing and failed jobs of a sweep")
    resume.add_argument("sweep", metavar="SWEEP", help="a sweep's name, or latest")
    _add_allowed(resume, "an argument of the plan that no plan can allow")
    garbage = command("gc", "gc:run_command", "remove unreferenced files, after asking")
    garbage.add_argument("--yes", action="store_true", help="do not ask")
    verify = command("verify", "verify:run_command", "repeat part of a run and compare the results")
    verify.add_argument("run", metavar="RUN", help=RUN_WORDS)
    verify.add_argument("--samples", type=int, default=20, metavar="N", help="per task (20)")
    verify.add_argument(
        "--tolerance", type=_non_negative_number, default=None, help="relative difference allowed"
    )
    _add_allowed(verify, ALLOWED_HELP)
    rescore = command(
        "rescore", "rescore:run_command", "apply the harness's present metrics to stored answers"
    )
    rescore.add_argument("run", metavar="RUN", help=RUN_WORDS)
    _add_allowed(rescore, ALLOWED_HELP)
    export = command("export", "export:run_command", "write the model of a run as a folder")
    export.add_argument("run", metavar="RUN", help=RUN_WORDS)
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--for", dest="engine", metavar="ENGINE", help=ENGINE_HELP)
    export.add_argument("--align", type=int, metavar="N", help="multiple of widths: 64 or 128")
    export.add_argument("--onnx", action="store_true", help="also write a classifier as ONNX")
    _add_allowed(export, ALLOWED_HELP)
    convert = command("convert", "convert:run_command", "rewrite a llava_llama checkpoint")
    convert.add_argument("source", type=Path, metavar="FOLDER", help="in LLaVA's own layout")
    convert.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    convert.add_argument("--tower", type=Path, required=True, help="a folder with its CLIP model")
    carve = command("carve", "carve:run_command", CARVE_HELP)
    carve.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    carve.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of model and calibration, as in a run",
    )
    for option, number, words in (
        ("--experts", 16, "routed experts in a layer"),
        ("--shared", 8, "width of the shared expert, in experts"),
        ("--chosen", 14, "routed experts of a token"),
    ):
        carve.add_argument(
            option, type=_positive_integer, default=number, metavar="N", help=f"{words} ({number})"
        )
    prefetch = command("prefetch", "prefetch:run_command", "download what a run or table needs")
    prefetch.add_argument("overrides", nargs="*", default=[], metavar="TABLE|KEY=VALUE")
    for added in (status, resume, garbage, verify, rescore, export):
        _add_results_dir(added)
    for added in (status, garbage, verify, rescore):
        _add_json_flag(added)


def _add_record_commands(command: AddCommand) -> None:
    """Add the commands that read records or inspect the installation."""
    listing = command("ls", "records:ls", "list models, methods, benchmarks, tables or runs")
    listing.add_argument("what", metavar="|".join(LISTABLE))
    show = command("show", "records:show", "show one record")
    show.add_argument("run", metavar="RUN", help=RUN_WORDS)
    show.add_argument("--command", action="store_true", help="print only the command of the run")
    show.add_argument("--why", metavar="OTHER", help="show only why OTHER has a different id")
    compare = command(
        "compare", "records:compare", "paired statistics between runs over shared samples"
    )
    compare.add_argument("runs", nargs="*", default=[], metavar="RUN", help=RUN_WORDS)
    compare.add_argument(
        "--baseline", metavar="RUN", help="the run to compare with (the dense run)"
    )
    compare.add_argument(
        "--seeds",
        action="store_true",
        help="compare settings in pairs of seeds, of the named runs or of all",
    )
    compare.add_argument(
        "--flips",
        type=_non_negative_integer,
        default=0,
        metavar="N",
        help="show N flipped samples each way",
    )
    plot = command("plot", "records:plot", PLOT_HELP)
    plot.add_argument("kind", metavar="KIND")
    plot.add_argument("runs", nargs="*", default=[], metavar="RUN")
    plot.add_argument("--task", default="average", help="the headline metric to show (average)")
    plot.add_argument("--cost", default="flops", help="flops, seconds, bytes, ... (flops)")
    plot.add_argument("--scope", help="the scope of the cost, as in `bench show`")
    plot.add_argument(
        "--knob", default="ratio", help="such as ratio, camera_p.alpha, calibration.rows (ratio)"
    )
    plot.add_argument("--output", type=Path, action="append", default=[], metavar="FILE")
    report = command("report", "records:report", "write one HTML file with all records")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RESULTS_DIR/report.html")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.add_argument(
        "--samples", type=_non_negative_integer, default=40, metavar="N", help="per run (40)"
    )
    report.add_argument(
        "--sample-runs",
        type=_non_negative_integer,
        default=200,
        metavar="N",
        help="include samples of the N newest runs (200)",
    )
    report.add_argument(
        "--images", action="store_true", help="include thumbnails of the images of these samples"
    )
    track = command(
        "track", "records:track", "send records to W&B again; without RUN: all, and an overview"
    )
    track.add_argument(
        "runs",
        nargs="*",
        default=[],
        metavar="RUN",
        help="or tracker.entity=NAME, for records that name it",
    )
    track.add_argument(
        "--model", type=Path, metavar="DIR", help="also send the exported model of the one RUN"
    )
    track.add_argument(
        "--workspace",
        action="store_true",
        help="save a W&B workspace that opens on score against cost; only without RUN",
    )
    doctor = command(
        "doctor", "doctor:run_command", "installed packages, devices, and what works offline"
    )
    consent = command(
        "trust", "trust:run_command", "allow the packages and configs of a project file"
    )
    consent.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="default: the nearest slimbench.toml"
    )
    consent.add_argument("--yes", action="store_true", help="do not ask")
    for added in (listing, show, compare, plot, report, track):
        _add_results_dir(added)
    for added in (listing, show, compare, plot, doctor):
        _add_json_flag(added)


def _add_allowed(added: argparse.ArgumentParser, text: str) -> None:
    """Add the overrides by which the user allows what a stored file only asks for."""
    added.add_argument("allowed", nargs="*", default=[], metavar="KEY=VALUE", help=text)


def _add_results_dir(added: argparse.ArgumentParser) -> None:
    cast(CommandParser, added).takes_results_dir = True
    added.add_argument(RESULTS_DIR_FLAG, type=_folder, default=Path("results"))


def _add_json_flag(added: argparse.ArgumentParser) -> None:
    added.add_argument("--json", action="store_true", help="print JSON")


def _folder(text: str) -> Path:
    try:
        refuse_unclear_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return Path(text)


def _non_negative_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # Nothing would agree within a tolerance that is no number, and everything within infinity.
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on, such as 1e-4")
    return number


def _non_negative_integer(text: str) -> int:
    # Nothing that is listed has so many entries; larger numbers fail in the libraries they reach.
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 0 or 40")
    return int(text)


def _positive_integer(text: str) -> int:
    if not _non_negative_integer(text):
        raise argparse.ArgumentTypeError("0 is too small: give 1 or more")
    return int(text)
