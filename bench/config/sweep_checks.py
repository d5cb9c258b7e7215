"""Checks of every alternative of a sweep before its first job starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bench.config.composition import (
    first_values,
    hydra_config_tree,
    hydra_errors_as_user_errors,
    sweep_values,
    validated,
)
from bench.config.run_config import RunConfig
from bench.errors import UserError
from bench.security import HYDRA_PACKAGES, refuse_foreign_code


class SingleRun(NamedTuple):
    """A single run of a sweep.

    `changed` is the override in which it differs from the first run of its method.
    """

    overrides: list[str]
    changed: str | None = None


def single_runs(overrides: list[str]) -> list[list[str]]:
    """Return single runs that together cover every alternative of a sweep, for every method.

    One run per alternative instead of their product: a few configs check a sweep of 200 jobs.
    """
    with hydra_errors_as_user_errors(overrides), hydra_config_tree():
        return [single.overrides for single in _sweep_runs(overrides)]


def alternative_configs(overrides: list[str]) -> list[RunConfig]:
    """Return the validated config of each alternative.

    Hydra composes once per method and per choice of a group; a plain value is set in a copy of the
    composed config, which takes a tenth of the time.
    """
    found = []
    first = DictConfig({})
    with hydra_errors_as_user_errors(overrides), hydra_config_tree() as loader:
        for single in _sweep_runs(overrides):
            if single.changed is None or not _is_value(single.changed, loader):
                composed = hydra_compose("config", overrides=single.overrides)
                first = composed if single.changed is None else first
            else:
                (parsed,) = OverridesParser.create().parse_overrides([single.changed])
                # `_singles` yields the unchanged run of a method first, so `first` is the one that
                # this run varies.
                composed = copy.deepcopy(first)
                OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True)
            found.append(validated(composed))
    return found


def is_sweep(overrides: list[str]) -> bool:
    """Return whether the arguments request a sweep, by a flag or by a config with mode MULTIRUN."""
    if {"-m", "--multirun"} & set(overrides):
        return True
    with hydra_errors_as_user_errors(overrides), hydra_config_tree():
        return bool(_first_composition(overrides).hydra.mode == RunMode.MULTIRUN)


def _first_composition(overrides: list[str]) -> DictConfig:
    """Compose the first value of everything, including Hydra's own config."""
    given = [override for override in overrides if not override.startswith("-")]
    composed = hydra_compose("config", overrides=first_values(given), return_hydra_config=True)
    assert isinstance(composed, DictConfig)
    return composed


def _sweep_runs(overrides: list[str]) -> Iterator[SingleRun]:
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
        yield from _one_change_runs(_choices(base, overrides))
        return
    shared = [o for o in overrides if not o.startswith(("-", "hydra"))]
    for run in listed:
        _refuse_remote_code_override(list(run))
        yield SingleRun([*run, *shared])


def _choices(base: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Return, per key, the overrides that the sweep goes through; keys of its config first."""
    given = [override for override in overrides if not override.startswith("-")]
    named = {text.split("=")[0] for text in given}
    params = base.hydra.sweeper.get("params") or base.hydra.sweeper.get("space") or {}
    # The command line wins over the sweeper's config, as in Hydra.
    texts = [f"{key}={value}" for key, value in params.items() if key not in named]
    choices: list[list[str]] = []
    for parsed in OverridesParser.create().parse_overrides([*texts, *given]):
        if parsed.is_sweep_override():
            key = parsed.get_key_element()
            choices.append([f"{key}={value}" for value in sweep_values(parsed)])
        else:
            assert parsed.input_line is not None
            choices.append([parsed.input_line])
    return choices


def _one_change_runs(choices: list[list[str]]) -> Iterator[SingleRun]:
    """Yield a first run per method, then one run per alternative value of each other key."""
    methods = next((values for values in choices if values[0].startswith("method=")), [])
    for method in methods or [""]:
        # Every value is combined with every method: a method may refuse a value others accept.
        mine = [[method] if values is methods else values for values in choices]
        first = [values[0] for values in mine]
        yield SingleRun(first)
        for place, values in enumerate(mine):
            for value in values[1:]:
                yield SingleRun([*first[:place], value, *first[place + 1 :]], value)


def _is_value(override: str, loader: ConfigLoader) -> bool:
    """Return whether an override sets an existing plain value, not a choice from a group."""
    key = override.partition("=")[0]
    # Anything but letters, digits, dots and underscores (+key, ~key, key@package) is left to Hydra.
    plain: Any = key.replace(".", "").replace("_", "")
    return plain.isalnum() and not loader.get_group_options(key)


def _refuse_remote_code_override(overrides: list[str]) -> None:
    """Reject overrides of `model.allow_remote_code`: only files in conf/model may grant it."""
    for override in overrides:
        # Checked on the text: after composition the value looks the same whoever set it.
        if override.lstrip("+~").startswith("model.allow_remote_code"):
            raise UserError(
                f"{override}: only a file in conf/model may allow a model to run its own code"
            )
