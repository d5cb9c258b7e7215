"""Every alternative of a sweep, looked at before the first job starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bench.compose import firsts, hydra_tree, plainly, typed, values_of
from bench.config import RunConfig
from bench.errors import UserError
from bench.trust import HYDRAS_OWN, refuse_foreign_code


class Single(NamedTuple):
    """One run out of a sweep; `changed` is what it has other than the first of its method."""

    overrides: list[str]
    changed: str | None = None


def alternatives(overrides: list[str]) -> list[list[str]]:
    """Return single runs that together use every alternative of a sweep beside every method.

    One run per alternative rather than their product: a sweep of 200 jobs is checked by a few.
    """
    with plainly(overrides), hydra_tree():
        return [single.overrides for single in _asked(overrides)]


def configs(overrides: list[str]) -> list[RunConfig]:
    """Return the config of every alternative, validated.

    Hydra composes once per method and per choice of a group; a plain value is put into what is
    composed already, which takes a tenth of the time.
    """
    found = []
    first = DictConfig({})
    with plainly(overrides), hydra_tree() as loader:
        for single in _asked(overrides):
            if single.changed is None or not _is_value(single.changed, loader):
                composed = hydra_compose("config", overrides=single.overrides)
                first = composed if single.changed is None else first
            else:
                (parsed,) = OverridesParser.create().parse_overrides([single.changed])
                composed = copy.deepcopy(first)
                OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True)
            found.append(typed(composed))
    return found


def is_sweep(overrides: list[str]) -> bool:
    """Whether the arguments ask for a sweep, by a flag or by a recipe whose mode is MULTIRUN."""
    if {"-m", "--multirun"} & set(overrides):
        return True
    with plainly(overrides), hydra_tree():
        return bool(_base(overrides).hydra.mode == RunMode.MULTIRUN)


def _base(overrides: list[str]) -> DictConfig:
    """Compose the first values of everything, Hydra's own part included."""
    given = [override for override in overrides if not override.startswith("-")]
    composed = hydra_compose("config", overrides=firsts(given), return_hydra_config=True)
    assert isinstance(composed, DictConfig)
    return composed


def _asked(overrides: list[str]) -> Iterator[Single]:
    """Yield the runs that a sweep lists, or single ones out of its product."""
    _refuse_own_permission(overrides)
    base = _base(overrides)
    own = OmegaConf.to_container(base.hydra, resolve=False)
    refuse_foreign_code(own, (*HYDRAS_OWN, *(base.get("packages") or ())), "hydra")
    listed = base.hydra.sweeper.get("runs")
    if not listed:
        yield from _singles(_choices(base, overrides))
        return
    shared = [o for o in overrides if not o.startswith(("-", "hydra"))]
    for run in listed:
        _refuse_own_permission(list(run))
        yield Single([*run, *shared])


def _choices(base: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Return per key the overrides that the sweep goes through, the recipe's keys first."""
    given = [override for override in overrides if not override.startswith("-")]
    named = {text.split("=")[0] for text in given}
    params = base.hydra.sweeper.get("params") or base.hydra.sweeper.get("space") or {}
    texts = [f"{key}={value}" for key, value in params.items() if key not in named]
    choices: list[list[str]] = []
    for parsed in OverridesParser.create().parse_overrides([*texts, *given]):
        if parsed.is_sweep_override():
            key = parsed.get_key_element()
            choices.append([f"{key}={value}" for value in values_of(parsed)])
        else:
            assert parsed.input_line is not None
            choices.append([parsed.input_line])
    return choices


def _singles(choices: list[list[str]]) -> Iterator[Single]:
    """Yield a first run per method, and after each one run per other value of every other key."""
    methods = next((values for values in choices if values[0].startswith("method=")), [])
    for method in methods or [""]:
        # What a method refuses shows only beside that method.
        mine = [[method] if values is methods else values for values in choices]
        first = [values[0] for values in mine]
        yield Single(first)
        for place, values in enumerate(mine):
            for value in values[1:]:
                yield Single([*first[:place], value, *first[place + 1 :]], value)


def _is_value(override: str, loader: ConfigLoader) -> bool:
    """Whether an override sets a value that is there, rather than choosing from a group."""
    key = override.partition("=")[0]
    plain: Any = key.replace(".", "").replace("_", "")
    return plain.isalnum() and not loader.get_group_options(key)


def _refuse_own_permission(overrides: list[str]) -> None:
    """Raise for who puts a model on the list of those whose code may run in passing."""
    for override in overrides:
        if override.lstrip("+~").startswith("model.allow_remote_code"):
            raise UserError(
                f"{override}: which models may bring code is said by the files of conf/model only"
            )
