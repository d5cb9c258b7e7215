"""`bench table`: run what is missing for a paper's table, then write it with published numbers.

The runs are those of `bench run`: the same overrides, the same sweep, the same records.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli.arguments import split_option
from bench.cli.commands.run import print_problems
from bench.config.composition import compose_run_config
from bench.config.overrides import Overrides, quoted_text, text_of
from bench.data import hub
from bench.data.calibration import resolve_calibration
from bench.data.prompts import resolve_prompts
from bench.errors import EXIT_DONE, EXIT_WRONG_INPUT, MissingData, RunsFailed, UserError
from bench.evaluation.task_planning import prefetch_command
from bench.models.source import resolve_model
from bench.records import Store
from bench.records.files import refuse_unwritable
from bench.reporting.tables import (
    build_table,
    load_table_config,
    records_of_table,
    table_slots,
)
from bench.reporting.tables.table_config import COSTS, PARTS, TO_DENSE, with_overrides
from bench.reporting.tables.writers import TABLE_FOLDER, print_table, table_rows, write_table
from bench.runner.inputs import resolve_run
from bench.runner.launch import LaunchOutcome, launch
from bench.runner.session import Session
from bench.ui import fail, print_json, print_text

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.records import Record
    from bench.reporting.tables import Table, TableSlot
    from bench.reporting.tables.table_config import TableConfig

RESERVED_KEYS = ("model", "method", "benchmark", "ratio", "experiment")
"""Keys that a table sets for its runs; users select among its rows instead."""
SELECTIONS = (*PARTS, COSTS, TO_DENSE)
"""Keys of the table whose value is a list of names."""
PAGE_OPTION = "--page"


class MissingInputs(UserError):
    """Inputs of a table's runs that are not available on this machine; one sentence each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = tuple(sentences)


@dataclass(frozen=True)
class FinishedTable:
    """A finished table, the outcome of its runs, and the files to which it was written."""

    table: Table
    launched: LaunchOutcome
    files: list[Path]


@dataclass
class TableRequest:
    """Command line of `bench table`, split into keys of the table, keys of its runs, and seeds."""

    scale: str | None = None
    selections: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    run_overrides: tuple[str, ...] = ()
    """Overrides for every run in addition to its own."""
    launcher_overrides: tuple[str, ...] = ()
    """Overrides of Hydra's config, which apply to the sweep of all runs."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> TableRequest:
        """Split the arguments.

        Raises:
            UserError: a key that the table sets is overridden, or a key other than the seed is
                swept.
        """
        request = cls()
        others = []
        own: dict[str, str] = {}
        for argument in arguments:
            # A table's own keys are not overrides of Hydra: names of rows may have any character.
            key, _, value = argument.partition("=")
            if key in ("scale", *SELECTIONS) and own.setdefault(key, argument) != argument:
                raise UserError(f"{own[key]} and {argument} both set {key}: give one of them")
            if key == "scale":
                request.scale = value
            elif key in SELECTIONS:
                request.selections[key] = _split_list(value)
            elif argument != "--json":
                others.append(argument)
        overrides = Overrides.parse(others).without_repeats()
        for override in overrides.parsed:
            key, text = override.key_or_group, text_of(override)
            if key in RESERVED_KEYS:
                raise UserError(
                    f"{text}: a table sets its own {key}; select by {_selection_keys()}"
                )
            if key == "seed" and overrides.multirun:
                request.seeds = _parse_seeds(text.partition("=")[2])
            # A cell is one number, or the mean over seeds.
            elif override.is_sweep_override():
                raise UserError(f"{text}: a table can only sweep the seed, as in -m seed=1,2,3")
        if overrides.multirun:
            overrides = overrides.without("seed")
        request.run_overrides = tuple(overrides.of_runs)
        request.launcher_overrides = tuple(overrides.of_hydra)
        return request


_LIST_ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""")


def _split_list(value: str) -> list[str]:
    """Split `[A,"B, C"]` into its names; one with a comma has to be in quotes."""
    text = value.removeprefix("[").removesuffix("]")
    # The last match is the empty one at the end of the text; an empty list has an empty name.
    return [name.strip("'\"") for name in _LIST_ITEM.findall(text)][:-1] or [""]


def _selection_keys() -> str:
    return ", ".join(f"{part}=[...]" for part in PARTS)


def _parse_seeds(value: str) -> tuple[int, ...]:
    texts = _split_list(value)
    if not all(text.isdecimal() for text in texts):
        raise UserError(f"seed={value}: give whole numbers, as in seed=1,2,3")
    seeds = tuple(map(int, texts))
    # A run that counts twice would make the mean look more certain than it is.
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seed={value}: give each seed once")
    return seeds


def make_table(name: str, arguments: Sequence[str], session: Session) -> FinishedTable:
    """Run what is missing, then build and write the table.

    Raises:
        MissingInputs: models or data are not available; nothing was run.
        UserError: the overrides are wrong; nothing was run.
    """
    request = TableRequest.parse(arguments)
    config = _table_config(name, request)
    lines = table_slots(config)
    runs = _distinct_runs(lines, request)
    names = _name_runs(runs, session)
    store = Store(names.results_dir)
    store.ensure_writable()
    refuse_unwritable("results_dir", store.root / TABLE_FOLDER, folder=True)
    # Records are found by run id, so a table shares runs with sweeps and other tables.
    wanted = [run for run in runs if names.force or store.find(names.ids[run]) is None]
    launched = _launch_runs(wanted, request, session) if wanted else LaunchOutcome()
    records = {line: _records_of(line, request, names, store) for line in lines if line.runs}
    table = build_table(config, records)
    return FinishedTable(table, launched, write_table(table, names.results_dir))


def write_page(name: str, arguments: Sequence[str], page: Path) -> Path:
    """Write the results page of a table from existing records; nothing is run.

    Raises:
        UserError: the overrides are wrong, there is no record, or the file cannot be written.
    """
    from bench.records import samples
    from bench.records.files import write_bytes
    from bench.reporting.tables.page import results_page

    request = TableRequest.parse(arguments)
    config = _table_config(name, request)
    # The overrides of a run help to identify its record.
    given, lines = request.run_overrides, table_slots(config)
    slots = {
        slot: replace(slot, runs=tuple(with_overrides(run, given) for run in slot.runs))
        for slot in lines
    }
    # A run of the table, because its benchmark may have keys that no other has.
    first = next(iter(_distinct_runs(lines, request)), given)
    results_dir = compose_run_config(first).results_dir
    by_run = records_of_table(list(slots.values()), Store(results_dir).all())
    found = {slot: by_run[run] for slot, run in slots.items() if run in by_run}
    command = shlex.join(["bench", "table", name, *arguments, "--page", page.as_posix()])
    text = results_page(config, found, lambda run: samples(run, results_dir), command)
    write_bytes(page, text.encode())
    return page


def runs_of_table(name: str, arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run that a table needs.

    Raises:
        UserError: there is no such table, or the overrides are wrong.
    """
    request = TableRequest.parse(arguments)
    return list(map(list, _distinct_runs(table_slots(_table_config(name, request)), request)))


def _table_config(name: str, request: TableRequest) -> TableConfig:
    """Return a table's config with the changes from the command line."""
    config: TableConfig = load_table_config(name, request.scale, request.selections)
    return config.model_copy(update={"seeds": request.seeds}) if request.seeds else config


def _distinct_runs(lines: Sequence[TableSlot], request: TableRequest) -> list[tuple[str, ...]]:
    """Return the runs of all lines without duplicates."""
    # The dense run, for example, belongs to many lines. A dict keeps the order of the table.
    runs = (with_overrides(run, request.run_overrides) for line in lines for run in line.runs)
    return list(dict.fromkeys(runs))


@dataclass(frozen=True)
class _RunIds:
    """The id of each run, and settings shared by all runs."""

    ids: dict[tuple[str, ...], str]
    results_dir: Path
    force: bool


def _name_runs(runs: Sequence[tuple[str, ...]], session: Session) -> _RunIds:
    """Compose and resolve every run and return its id; report all missing inputs together."""
    if not runs:
        raise UserError("the selected rows have only published numbers: select different rows")
    configs = {run: compose_run_config(run) for run in runs}
    # `resolve_run` stops at the first missing input, but a table with many models should report
    # all of them.
    _refuse_missing(list(configs.values()), session)
    first = next(iter(configs.values()))
    ids = {run: resolve_run(config, session).id for run, config in configs.items()}
    return _RunIds(ids, first.results_dir, first.force)


def _refuse_missing(configs: Sequence[RunConfig], session: Session) -> None:
    """Raise with one sentence for each model and data set that is not available."""
    # A single probe instead of a timeout per model and data set; afterwards only caches are
    # searched.
    if _may_need_hub(configs) and not hub.is_reachable():
        hub.go_offline()
    sentences = dict.fromkeys(s for config in configs for s in _missing_inputs(config, session))
    if sentences:
        raise MissingInputs(list(sentences))


def _may_need_hub(configs: Sequence[RunConfig]) -> bool:
    """Return whether any run may need the hub; tables of embedded models must not wait for it."""
    models = (config.model for config in configs)
    if any(m.path is None and not m.source.startswith(("embedded:", "fresh:")) for m in models):
        return True
    benchmarks = (config.benchmark for config in configs)
    return any(benchmark.suite == "real" and benchmark.tasks for benchmark in benchmarks)


def _missing_inputs(config: RunConfig, session: Session) -> Iterator[str]:
    """Yield a sentence for each missing input of a run."""
    offline, benchmark = config.offline, config.benchmark
    lookups: list[Callable[[], object]] = [
        lambda: resolve_model(config.model, offline=offline),
        lambda: session.benchmarks.plan(benchmark, offline=offline),
    ]
    if config.uses_calibration:
        lookups.append(lambda: resolve_calibration(config.calibration, offline=offline))
    if config.uses_prompts:
        lookups.append(lambda: resolve_prompts(config.prompts, offline=offline))
    cure = f"run `{prefetch_command(benchmark)}` on a machine with network access"
    for look_up in lookups:
        try:
            look_up()
        except MissingData as error:
            # Only a benchmark has several items, and its message does not contain the cure.
            for item in error.items:
                yield f"data {item} are neither cached nor reachable: {cure}"
            if not error.items:
                yield str(error)


def _launch_runs(
    runs: Sequence[tuple[str, ...]], request: TableRequest, session: Session
) -> LaunchOutcome:
    """Run all of them as a sweep of `bench run -m`; a failed run leaves its cells empty."""
    listed = ",".join(f"[{','.join(map(quoted_text, run))}]" for run in runs)
    sweep = ["-m", "hydra/sweeper=list", f"hydra.sweeper.runs=[{listed}]"]
    try:
        return launch([*sweep, *request.launcher_overrides], session)
    except RunsFailed as error:
        return LaunchOutcome(failures=list(error.reasons))


def _records_of(
    line: TableSlot, request: TableRequest, names: _RunIds, store: Store
) -> list[Record]:
    """Return the records of a line, or none if one of its runs failed."""
    ids = [names.ids[with_overrides(run, request.run_overrides)] for run in line.runs]
    records = [record for record in map(store.find, ids) if record is not None]
    # A mean over only the successful seeds would not be the number that the table states.
    return records if len(records) == len(ids) else []


def run_command(arguments: list[str]) -> int:
    """`bench table NAME [KEY=VALUE ...] [-m] [--page FILE]`."""
    page, arguments = _split_page(arguments)
    # The name may be anywhere among the overrides, as Hydra allows for its own flags.
    # `~KEY` is an override without a value.
    names = [word for word in arguments if not word.startswith(("-", "~")) and "=" not in word]
    if len(names) != 1:
        raise UserError(f"bench table takes one name, got {len(names)}: see `bench ls tables`")
    overrides = [word for word in arguments if word != names[0]]
    if page is not None:
        print_text(f"wrote {write_page(names[0], overrides, page)}")
        return EXIT_DONE
    try:
        with Session(freezes=True) as session:
            finished = make_table(names[0], overrides, session)
    except MissingInputs as error:
        for sentence in error.sentences:
            fail(sentence)
        return EXIT_WRONG_INPUT
    if "--json" in arguments:
        print_json(table_rows(finished.table))
    else:
        print_table(finished.table)
        print_text("wrote " + " ".join(map(str, finished.files)))
    return print_problems(finished.launched)


def _split_page(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file after `--page`, None without the option, and the other arguments."""
    value, rest = split_option(arguments, PAGE_OPTION)
    if value is None:
        return None, rest
    if value.startswith("-") or not value.endswith(".md"):
        raise UserError(f"{PAGE_OPTION} {value}: give a file, as in {PAGE_OPTION} results.md")
    return Path(value), rest
