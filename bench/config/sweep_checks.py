"""Checks of every alternative of a sweep before its first job starts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from hydra import compose as hydra_compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from bench.config.composition import (
    compose_run_config,
    hydra_config_tree,
    hydra_errors_as_user_errors,
    refuse_choices,
    refuse_empty_mappings,
)
from bench.config.gate import (
    check_composed,
    check_overrides,
    check_plan,
    check_run_overrides,
    listed_runs,
    plan_arguments,
    refuse_unplanned,
)
from bench.config.overrides import (
    Overrides,
    refuse_endless_grid,
    sets,
    sweep_values,
    text_of,
)
from bench.config.run_config import RunConfig, validated
from bench.errors import UserError, nearest
from bench.measurement.quantities import COST_QUANTITIES, COUNTED_PREFIXES
from bench.schema import BenchmarkConfig


class SingleRun(NamedTuple):
    """A single run of a sweep.

    `changed` is the override that differs from the first run of its method.
    """

    overrides: list[str]
    changed: str | None = None


class SweptKey(NamedTuple):
    """A key of a sweep with one override per value, or with its only override."""

    key: str
    overrides: list[str]


def single_runs(overrides: Overrides) -> list[list[str]]:
    """Return single runs that together cover every alternative of a sweep, for every method.

    One run per alternative instead of their product, so that a few configs check a sweep of 200
    jobs.
    """
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        return [
            single.overrides for single in _sweep_runs(overrides, _first_composition(overrides))
        ]


def alternative_configs(
    overrides: Overrides, composed_first: DictConfig | None = None
) -> list[RunConfig]:
    """Return the validated config of each alternative.

    Hydra composes once per method and per choice of a group. A plain value is set in a copy of the
    composed config, which takes a tenth of the time. The composed config from `admit` is reused.
    """
    found = []
    first = DictConfig({})
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree() as loader:
        base = _first_composition(overrides) if composed_first is None else composed_first
        for single in _sweep_runs(overrides, base):
            refuse_choices(Overrides.parse(single.overrides), loader)
            changed = None if single.changed is None else _parse_one(single.changed)
            if changed is None or not _is_value(changed, loader):
                composed = (
                    _without_hydra(base)
                    if single.overrides == overrides.first_values()
                    else hydra_compose("config", overrides=single.overrides)
                )
                first = composed if changed is None else first
            else:
                # `_sweep_runs` yields a method's unchanged run first, so `first` is the run to
                # vary.
                composed = copy.deepcopy(first)
                OmegaConf.update(composed, changed.key_or_group, changed.value(), merge=True)
            found.append(validated(composed))
    return found


def every_config(overrides: Overrides, admitted: Admitted) -> Iterator[RunConfig]:
    """Yield the validated config of every run of a sweep in order, or of the corners of a search.

    The trials of a search are not known in advance; each corner has one change from the first run.
    """
    composed = admitted.composed
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree() as loader:
        listed = composed.hydra.sweeper.get("runs")
        if listed:
            jobs = [[*run, *overrides.of_runs] for run in listed]
        elif "space" in composed.hydra.sweeper:
            jobs = [run.overrides for run in _sweep_runs(overrides, composed)]
        else:
            choices = [each.overrides for each in _swept_keys(composed, overrides)]
            jobs = [list(job) for job in itertools.product(*choices)]
        bases: dict[tuple[str, ...], DictConfig] = {}
        for job in jobs:
            parsed = [_parse_one(text) for text in job]
            # Hydra's own config is not part of a run's config.
            plain = {
                place
                for place, each in enumerate(parsed)
                if not sets(each, "hydra") and _is_value(each, loader)
            }
            # Composed once per choice of groups, because setting a plain value takes a tenth of the
            # time.
            key = tuple(text for place, text in enumerate(job) if place not in plain)
            if key not in bases:
                bases[key] = (
                    _without_hydra(composed)
                    if job == overrides.first_values()
                    else hydra_compose("config", overrides=job)
                )
            run = copy.deepcopy(bases[key])
            for place in sorted(plain):
                OmegaConf.update(run, parsed[place].key_or_group, parsed[place].value(), merge=True)
            yield validated(run)


@dataclass(frozen=True)
class Admitted:
    """Arguments that have passed the gate, in the order that Hydra requires.

    Hydra is started only with these; only `admit` and `admit_plan` create them.
    """

    arguments: tuple[str, ...]
    is_sweep: bool
    composed: DictConfig
    """Config composed from the first value of every key, including Hydra's own section."""

    def in_folder(self, folder: Path) -> Admitted:
        """Return the arguments with the folder of a sweep, which users cannot choose."""
        return replace(self, arguments=(*self.arguments, f"hydra.sweep.dir={folder}"))


def admit(overrides: Overrides) -> Admitted:
    """Check arguments of the command line, and the Hydra config composed from them.

    Raises:
        UserError: they are refused, see `bench.config.gate`, or a key of a single run has several
            values.
    """
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        composed = _first_composition(overrides)
    return _admitted(overrides, composed)


def admit_plan(
    folder: Path,
    arguments: Sequence[str],
    jobs: Sequence[Sequence[str]],
    repeated: Sequence[str],
) -> Admitted:
    """Check arguments and jobs of the plan in a sweep's folder, which may be untrusted.

    `repeated` are arguments of the plan that are repeated in this command.

    Raises:
        UserError: they are refused, or request more than what is repeated.
    """
    overrides = plan_arguments(arguments, folder.name)
    # Before composition, which imports the packages of a search path.
    check_plan(folder, overrides, jobs, repeated)
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        composed = _first_composition(overrides)
    runs = [*jobs, *listed_runs(composed)]
    check_plan(folder, overrides, runs, repeated)
    refuse_unplanned(folder, overrides, runs, repeated)
    return _admitted(overrides, composed)


def _admitted(overrides: Overrides, composed: DictConfig) -> Admitted:
    # A flag or a config with mode MULTIRUN requests a sweep.
    is_sweep = overrides.multirun or bool(composed.hydra.mode == RunMode.MULTIRUN)
    if not is_sweep:
        overrides.refuse_several_values()
    return Admitted(tuple(overrides.arguments), is_sweep, composed)


def check_sweeper(
    overrides: Overrides, configs: Sequence[RunConfig], composed: DictConfig
) -> RunConfig | None:
    """Raise if the sweeper's settings are invalid, or its objectives do not exist in its runs.

    `composed` is from `admit`. Called after `alternative_configs`, which refuses a sweeper from a
    package that is not allowed. Returns the config of an early run of a search, if it has any.
    """
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        settings = composed.hydra.sweeper
        known = Plugins.instance().class_name_to_class
        if settings.get("_target_") not in known:
            return None  # Hydra reports those that it knows.
        try:
            sweeper = instantiate(settings)
        except InstantiationException as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"hydra.sweeper: {error.__cause__ or error}") from None
    for name in getattr(sweeper, "objectives", ()):
        for config in configs:
            refuse_unknown_objective("hydra.sweeper.objectives", name, config.benchmark)
    if not hasattr(sweeper, "objectives"):
        return None
    benchmarks = dict.fromkeys(config.benchmark.name for config in configs)
    if len(benchmarks) > 1:
        raise UserError(
            f"a search over benchmark={','.join(benchmarks)} would compare scores of different "
            "questions: give each its own search"
        )
    if not sweeper.early_tasks:
        return None
    early = Overrides.parse(sweeper.early_overrides(composed))
    first = Overrides.parse(single_runs(overrides)[0])
    for override in early.parsed:
        first = first.without(override.key_or_group)
    return compose_run_config([*first.texts, *early.texts])


def refuse_unknown_objective(key: str, name: str, benchmark: BenchmarkConfig) -> None:
    """Raise unless a run with a benchmark has a metric or a cost of this name."""
    metrics = {"average", *benchmark.tasks, *benchmark.perplexity}
    if benchmark.harness == "images":
        metrics.add(benchmark.images.data)
    # A task that is a group also has a metric for each of its tasks.
    prefixes = (*COUNTED_PREFIXES, *(f"{task}_" for task in benchmark.tasks))
    if name in metrics or name in COST_QUANTITIES or name.startswith(prefixes):
        return
    close = nearest(name, [*metrics, *COST_QUANTITIES])
    hint = f"did you mean {close!r}? " if close else ""
    raise UserError(
        f"{key}: {name!r} is neither a metric of benchmark={benchmark.name} nor a cost: {hint}"
        f"allowed: {', '.join(sorted(metrics))}, or a cost such as flops, bytes or parameters"
    )


def _first_composition(overrides: Overrides) -> DictConfig:
    """Compose and check the first value of every key, including Hydra's own config."""
    check_overrides(overrides)
    composed = hydra_compose("config", overrides=overrides.first_values(), return_hydra_config=True)
    assert isinstance(composed, DictConfig)
    check_composed(composed)
    refuse_empty_mappings(overrides, composed)
    _refuse_sweeps_of_sweeps(overrides, composed)
    for run in listed_runs(composed):
        check_run_overrides(run)
    return composed


def _refuse_sweeps_of_sweeps(overrides: Overrides, composed: DictConfig) -> None:
    """Raise if a sweep is over files of which one has its own sweep.

    Hydra would use the sweep of the first one and repeat it under the names of the others.
    """
    for group in ("experiment", "sweep"):
        swept = [o for o in overrides.parsed if o.key_or_group == group and o.is_sweep_override()]
        for value in sweep_values(swept[0]) if swept else ():
            rest = overrides.without(group).first_values()
            other = hydra_compose(
                "config", overrides=[*rest, f"{group}={value}"], return_hydra_config=True
            )
            if any(other.hydra[part] != composed.hydra[part] for part in ("sweeper", "launcher")):
                raise UserError(
                    f"{text_of(swept[0])}: {group}={value} has its own sweep, and a command can "
                    f"run only one: give each {group} its own command"
                )


def _without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy without Hydra's own section, as in a job."""
    plain = copy.deepcopy(composed)
    with open_dict(plain):
        del plain["hydra"]
    return plain


def _sweep_runs(overrides: Overrides, base: DictConfig) -> Iterator[SingleRun]:
    """Yield the runs that a sweep lists, or single runs that cover its product."""
    # Every run of the list sweeper is checked, because its runs need not form a product.
    listed = base.hydra.sweeper.get("runs")
    if not listed:
        swept = _swept_keys(base, overrides)
        if "max_jobs" in base.hydra.sweeper:
            counts = {each.key: len(each.overrides) for each in swept}
            refuse_endless_grid(counts, base.hydra.sweeper.max_jobs)
        yield from _one_change_runs(swept)
        return
    for run in listed:
        yield SingleRun([*run, *overrides.of_runs])


def _swept_keys(base: DictConfig, overrides: Overrides) -> list[SweptKey]:
    """Return the keys over which the sweep runs, those of its config first."""
    given = {override.key_or_group for override in overrides.parsed}
    params = base.hydra.sweeper.get("params") or base.hydra.sweeper.get("space") or {}
    # The command line takes precedence over the sweeper's config, as in Hydra.
    recipe = Overrides.parse([f"{key}={text}" for key, text in params.items() if key not in given])
    return [
        SweptKey(
            override.key_or_group,
            [f"{override.get_key_element()}={value}" for value in sweep_values(override)]
            if override.is_sweep_override()
            else [text_of(override)],
        )
        for override in (*recipe.parsed, *overrides.parsed)
    ]


def _one_change_runs(swept: list[SweptKey]) -> Iterator[SingleRun]:
    """Yield a first run per method, then one run per alternative value of each other key."""
    methods = next((each for each in swept if each.key == "method"), SweptKey("method", [""]))
    for method in methods.overrides:
        # Every value is combined with every method, because a method may refuse a value.
        choices = [[method] if each is methods else each.overrides for each in swept]
        first = [values[0] for values in choices]
        yield SingleRun(first)
        for place, values in enumerate(choices):
            for value in values[1:]:
                yield SingleRun([*first[:place], value, *first[place + 1 :]], value)


def _parse_one(text: str) -> Override:
    (parsed,) = Overrides.parse([text]).parsed
    return parsed


def _is_value(override: Override, loader: ConfigLoader) -> bool:
    """Return whether an override sets an existing plain value instead of a choice of a group."""
    key = override.get_key_element()
    # Anything but letters, digits, dots and underscores (+key, ~key, key@package) is left to Hydra.
    return key.replace(".", "").replace("_", "").isalnum() and not loader.get_group_options(key)
