"""Checks of every alternative of a sweep before its first job starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

from hydra import compose as hydra_compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bench.config.composition import (
    hydra_config_tree,
    hydra_errors_as_user_errors,
    refuse_doubles,
    validated,
)
from bench.config.overrides import Overrides, sets, sweep_values, text_of
from bench.config.run_config import RunConfig
from bench.errors import UserError
from bench.security import HYDRA_PACKAGES, refuse_foreign_code


class SingleRun(NamedTuple):
    """A single run of a sweep.

    `changed` is the override in which it differs from the first run of its method.
    """

    overrides: list[str]
    changed: str | None = None


class SweptKey(NamedTuple):
    """A key of a sweep with one override per value, or with its only override."""

    key: str
    overrides: list[str]


def single_runs(overrides: Overrides) -> list[list[str]]:
    """Return single runs that together cover every alternative of a sweep, for every method.

    One run per alternative instead of their product: a few configs check a sweep of 200 jobs.
    """
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        return [single.overrides for single in _sweep_runs(overrides)]


def alternative_configs(overrides: Overrides) -> list[RunConfig]:
    """Return the validated config of each alternative.

    Hydra composes once per method and per choice of a group; a plain value is set in a copy of the
    composed config, which takes a tenth of the time.
    """
    found = []
    first = DictConfig({})
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree() as loader:
        for single in _sweep_runs(overrides):
            refuse_doubles(Overrides.parse(single.overrides), loader)
            changed = None if single.changed is None else _parse_one(single.changed)
            if changed is None or not _is_value(changed, loader):
                composed = hydra_compose("config", overrides=single.overrides)
                first = composed if changed is None else first
            else:
                # `_sweep_runs` yields the unchanged run of a method first, so `first` is the one
                # that this run varies.
                composed = copy.deepcopy(first)
                OmegaConf.update(composed, changed.key_or_group, changed.value(), merge=True)
            found.append(validated(composed))
    return found


def is_sweep(overrides: Overrides) -> bool:
    """Return whether the arguments request a sweep, by a flag or by a config with mode MULTIRUN."""
    if overrides.multirun:
        return True
    with hydra_errors_as_user_errors(overrides.texts), hydra_config_tree():
        return bool(_first_composition(overrides).hydra.mode == RunMode.MULTIRUN)


def _first_composition(overrides: Overrides) -> DictConfig:
    """Compose the first value of everything, including Hydra's own config."""
    composed = hydra_compose("config", overrides=overrides.first_values(), return_hydra_config=True)
    assert isinstance(composed, DictConfig)
    return composed


def _sweep_runs(overrides: Overrides) -> Iterator[SingleRun]:
    """Yield the runs that a sweep lists, or single runs that cover its product."""
    _refuse_remote_code_override(overrides)
    base = _first_composition(overrides)
    # Unresolved: values such as ${hydra:runtime.cwd} exist only inside a job. Launchers and
    # sweepers are instantiated by Hydra before our own validation, so their `_target_` is checked
    # here.
    own = OmegaConf.to_container(base.hydra, resolve=False)
    refuse_foreign_code(own, (*HYDRA_PACKAGES, *(base.get("packages") or ())), "hydra")
    # The list sweeper has explicit runs; every one of them is checked, as they need not form a
    # product.
    listed = base.hydra.sweeper.get("runs")
    if not listed:
        yield from _one_change_runs(_swept_keys(base, overrides))
        return
    for run in listed:
        _refuse_remote_code_override(Overrides.parse(list(run)))
        yield SingleRun([*run, *overrides.of_runs])


def _swept_keys(base: DictConfig, overrides: Overrides) -> list[SweptKey]:
    """Return the keys that the sweep goes through; those of its config first."""
    given = {override.key_or_group for override in overrides.parsed}
    params = base.hydra.sweeper.get("params") or base.hydra.sweeper.get("space") or {}
    # The command line wins over the sweeper's config, as in Hydra.
    recipe = Overrides.parse([f"{key}={text}" for key, text in params.items() if key not in given])
    _refuse_remote_code_override(recipe)
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
        # Every value is combined with every method: a method may refuse a value others accept.
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
    """Return whether an override sets an existing plain value, not a choice from a group."""
    key = override.get_key_element()
    # Anything but letters, digits, dots and underscores (+key, ~key, key@package) is left to Hydra.
    return key.replace(".", "").replace("_", "").isalnum() and not loader.get_group_options(key)


def _refuse_remote_code_override(overrides: Overrides) -> None:
    """Reject overrides of `model.allow_remote_code`: only files in conf/model may grant it."""
    for override in overrides.parsed:
        # Checked before composition, after which the value looks the same whoever set it.
        if sets(override, "model.allow_remote_code"):
            raise UserError(
                f"{text_of(override)}: only a file in conf/model may allow a model to run its own "
                "code"
            )
