"""`bench table`: run what a paper's table lacks, then write our numbers next to the published ones.

The runs are those of `bench run`: the same overrides, the same sweep, the same records.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.errors import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, MissingData, UserError
from bench.reporting.tables.table_config import PARTS

if TYPE_CHECKING:
    from pathlib import Path

    from bench.config.run_config import RunConfig
    from bench.records import Record, Store
    from bench.reporting.tables import Table, TableSlot
    from bench.reporting.tables.table_config import TableConfig
    from bench.runner.launch import CheckRun, ExecuteRun, LaunchOutcome

RESERVED_KEYS = ("model", "method", "benchmark", "ratio", "experiment")
"""Keys that a table sets for its runs; users select among its rows instead."""


class MissingInputs(UserError):
    """Inputs of a table's runs that this machine cannot reach; one sentence each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = tuple(sentences)


@dataclass(frozen=True)
class FinishedTable:
    """A finished table, its run outcomes, and the files it was written to."""

    table: Table
    launched: LaunchOutcome
    files: list[Path]


@dataclass
class TableRequest:
    """Command line of `bench table`, split into keys of the table, keys of its runs, and seeds."""

    scale: str | None = None
    chosen: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    shared: list[str] = field(default_factory=list)

    @property
    def own(self) -> tuple[str, ...]:
        """Overrides that every run receives in addition to its own."""
        return tuple(o for o in self.shared if not o.startswith("hydra"))

    @classmethod
    def read(cls, overrides: Sequence[str]) -> TableRequest:
        """Split the overrides.

        Raises:
            UserError: a key that the table sets is overridden, or a key other than the seed is
                swept.
        """
        asked, multirun = cls(), bool({"-m", "--multirun"} & set(overrides))
        for override in overrides:
            key, _, value = override.partition("=")
            if override.startswith("-"):
                continue
            if key == "scale":
                asked.scale = value
            elif key in PARTS:
                asked.chosen[key] = _split_list(value)
            elif key in RESERVED_KEYS:
                raise UserError(
                    f"{override}: a table sets its own {key}; select by {_selection_keys()}"
                )
            elif key == "seed" and multirun:
                asked.seeds = tuple(_parse_seeds(value))
            else:
                asked.shared.append(_refuse_sweep(override))
        return asked


def _split_list(value: str) -> list[str]:
    return [name.strip().strip("'\"") for name in value.strip("[]").split(",")]


def _selection_keys() -> str:
    return ", ".join(f"{part}=[...]" for part in PARTS)


def _parse_seeds(value: str) -> Iterator[int]:
    for text in _split_list(value):
        if not text.isdigit():
            raise UserError(f"seed={value}: give whole numbers, as in seed=1,2,3")
        yield int(text)


def _refuse_sweep(override: str) -> str:
    """Refuse a sweep over anything but seeds: a cell is one number, or the mean over seeds."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from bench.config.composition import hydra_errors_as_user_errors

    with hydra_errors_as_user_errors([override]):
        parsed = OverridesParser.create().parse_override(override)
    if parsed.is_sweep_override():
        raise UserError(f"{override}: a table can only sweep the seed, as in -m seed=1,2,3")
    return override


def make_table(name: str, overrides: Sequence[str]) -> FinishedTable:
    """Run what is missing, then build and write the table.

    Raises:
        MissingInputs: models or data are out of reach; nothing was run.
        UserError: the overrides are wrong; nothing was run.
    """
    from bench.records import Store
    from bench.reporting.tables import build_table, table_slots
    from bench.reporting.tables.writers import write_table
    from bench.runner.execute import execute
    from bench.runner.inputs import check_run
    from bench.runner.launch import LaunchOutcome

    asked = TableRequest.read(overrides)
    config, own = _table_config(name, asked), asked.own
    lines = table_slots(config)
    runs = _distinct_runs(lines, own)
    ids = _name_runs(runs)
    store = Store(ids.results_dir)
    # Records are looked up by run id, so a table shares runs with sweeps and with other tables.
    wanted = [run for run in runs if ids.force or store.find(ids.of[run]) is None]
    launched = _launch_runs(wanted, asked.shared, check_run, execute) if wanted else LaunchOutcome()
    found = {line: _records_of(line, own, ids.of, store) for line in lines if line.runs}
    table = build_table(config, found)
    return FinishedTable(table, launched, write_table(table, ids.results_dir))


def runs_of_table(name: str, overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run that a table needs.

    Raises:
        UserError: there is no such table, or the overrides are wrong.
    """
    from bench.reporting.tables import table_slots

    asked = TableRequest.read(overrides)
    return [list(run) for run in _distinct_runs(table_slots(_table_config(name, asked)), asked.own)]


def _table_config(name: str, asked: TableRequest) -> TableConfig:
    """Return a table's config with the changes from the command line."""
    from bench.reporting.tables import load_table_config

    config: TableConfig = load_table_config(name, asked.scale, asked.chosen)
    if asked.seeds:
        config = config.model_copy(update={"seeds": asked.seeds})
    return config


def _distinct_runs(lines: Sequence[TableSlot], own: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the runs of all lines without duplicates."""
    from bench.reporting.tables.table_config import with_overrides

    # The dense run, for example, stands in many lines; a dict keeps the order of the table.
    return list(dict.fromkeys(with_overrides(run, own) for line in lines for run in line.runs))


@dataclass(frozen=True)
class _RunIds:
    """The id of each run, and settings shared by all runs."""

    of: dict[tuple[str, ...], str]
    results_dir: Path
    force: bool


def _name_runs(runs: Sequence[tuple[str, ...]]) -> _RunIds:
    """Compose and resolve every run and return its id; report all missing inputs at once."""
    from bench.config.composition import compose_run_config
    from bench.runner.inputs import resolve_run

    if not runs:
        raise UserError("the selected rows have only published numbers: select different rows")
    configs = {run: compose_run_config(list(run)) for run in runs}
    # `resolve` would stop at the first missing input; a table with many models should name all of
    # them.
    _refuse_missing(list(configs.values()))
    first = next(iter(configs.values()))
    named = {run: resolve_run(config).id for run, config in configs.items()}
    return _RunIds(named, first.results_dir, first.force)


def _refuse_missing(configs: Sequence[RunConfig]) -> None:
    """Raise with one sentence for each model and data set that cannot be reached."""
    from bench.data import hub

    # One probe instead of a timeout per model and data set; after it everything is looked up in
    # caches.
    if _may_need_hub(configs) and not hub.is_reachable():
        hub.go_offline()
    sentences = dict.fromkeys(s for config in configs for s in _missing_inputs(config))
    if sentences:
        raise MissingInputs(list(sentences))


def _may_need_hub(configs: Sequence[RunConfig]) -> bool:
    """Return whether any run may need the hub; a table of embedded models must not wait for it."""
    models = (config.model for config in configs)
    hub = any(m.path is None and not m.source.startswith(("embedded:", "fresh:")) for m in models)
    return hub or any(config.benchmark.suite == "real" and config.benchmark.tasks
                      for config in configs)  # fmt: skip


def _missing_inputs(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each missing input of a run."""
    from bench.data import calibration, prompts
    from bench.evaluation import plan_once
    from bench.models import source

    offline, benchmark = config.offline, config.benchmark
    try:
        source.resolve_model(config.model, offline=offline)
    except MissingData as error:
        yield str(error)
    try:
        plan_once(benchmark, offline=offline)
    except MissingData as error:
        cure = f"run `bench prefetch benchmark={benchmark.name}` on a machine with network access"
        for item in error.items:
            yield f"data {item} are neither cached nor reachable: {cure}"
        if not error.items:
            yield str(error)
    if config.uses_calibration:
        try:
            calibration.resolve_calibration(config.calibration, offline=offline)
        except MissingData as error:
            yield str(error)
    if config.uses_prompts:
        try:
            prompts.resolve_prompts(config.prompts, offline=offline)
        except MissingData as error:
            yield str(error)


def _launch_runs(
    runs: Sequence[tuple[str, ...]], shared: Sequence[str], check: CheckRun, execute: ExecuteRun
) -> LaunchOutcome:
    """Run them as a sweep of `bench run -m`; a failed run leaves its cells empty."""
    from bench.errors import RunsFailed
    from bench.runner.launch import LaunchOutcome, launch

    listed = ",".join(f"[{','.join(map(_quoted, run))}]" for run in runs)
    sweep = ["-m", "hydra/sweeper=list", f"hydra.sweeper.runs=[{listed}]"]
    # Overrides of single runs are inside `runs` already; the rest configures the launcher.
    launcher = [o for o in shared if o.startswith("hydra")]
    try:
        return launch([*sweep, *launcher], check, execute)
    except RunsFailed as error:
        return LaunchOutcome(failures=list(error.reasons))


def _quoted(override: str) -> str:
    """Quote an override by Hydra's grammar, in which backslashes count only before a quote."""
    # Backslashes directly before a quote are doubled and the quote escaped; a trailing run of
    # backslashes is doubled too, since the closing quote follows it.
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", override)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def _records_of(
    line: TableSlot, own: tuple[str, ...], ids: dict[tuple[str, ...], str], store: Store
) -> list[Record]:
    """Return the records of a line, or none if one of its runs failed."""
    from bench.reporting.tables.table_config import with_overrides

    found = [store.find(ids[with_overrides(run, own)]) for run in line.runs]
    # A mean over the seeds that happened to succeed would not be the number that the table
    # announces.
    whole = [record for record in found if record is not None]
    return whole if len(whole) == len(found) else []


def run_command(given: list[str]) -> int:
    """`bench table NAME [KEY=VALUE ...] [-m]`."""
    from bench.reporting.tables.writers import print_table, table_rows

    # The name may stand anywhere among the overrides, as Hydra allows for its own flags.
    named = [word for word in given if not word.startswith("-") and "=" not in word]
    if len(named) != 1:
        raise UserError(f"bench table takes one name, got {len(named)}: see `bench ls tables`")
    try:
        finished = make_table(named[0], [word for word in given if word != named[0]])
    except MissingInputs as error:
        for sentence in error.sentences:
            print(f"bench: {sentence}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if "--json" in given:
        print(json.dumps(table_rows(finished.table), indent=1, default=str))
    else:
        print_table(finished.table)
        print("wrote " + " ".join(map(str, finished.files)))
    for warning in dict.fromkeys(finished.launched.warnings):
        print(f"bench: {warning}", file=sys.stderr)
    for failure in finished.launched.failures:
        print(f"bench: failed: {failure}", file=sys.stderr)
    return EXIT_FAILED if finished.launched.failures else EXIT_DONE
