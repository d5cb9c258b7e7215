"""From command-line overrides to a validated config, with errors that a user can act on.

Hydra's own exceptions are precise but long; `plainly` turns each into one sentence with the
nearest match. `check_sweep` looks at every alternative of a sweep before the first job starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bench.config import RunConfig, validate
from bench.errors import UserError, nearest, unknown

CONFIG_MODULE = "conf"


@contextmanager
def hydra_tree() -> Iterator[ConfigLoader]:
    """Open the shipped config tree for the compose API and close it again."""
    GlobalHydra.instance().clear()
    with initialize_config_module(config_module=CONFIG_MODULE, version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def run_config(overrides: list[str]) -> RunConfig:
    """Compose and validate the config of one run; a `UserError` says what is wrong."""
    with plainly(overrides), hydra_tree():
        return typed(hydra_compose("config", overrides=overrides))


def typed(composed: DictConfig) -> RunConfig:
    """Resolve a composed config and validate it; secrets cannot be in it, so none leak."""
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    return validate({str(key): value for key, value in plain.items()})


def options(group: str) -> list[str]:
    """Return the names in one config group (`model`, `method`, ...), third parties' included.

    Files named `_NAME` are parts of others.
    """
    with hydra_tree() as loader:
        names = loader.get_group_options(group)
    return sorted(name for name in names if name != "dense" and not name.startswith("_"))


def alternatives(overrides: list[str]) -> list[list[str]]:
    """Return single runs that together use every alternative of a sweep beside every method.

    One run per alternative rather than their product: a sweep of 200 jobs is checked by a few.
    """
    with plainly(overrides), hydra_tree():
        parser = OverridesParser.create()
        given = [o for o in overrides if not o.startswith("-")]
        base = hydra_compose("config", overrides=_firsts(given), return_hydra_config=True)
        if base.hydra.sweeper.get("runs"):
            shared = [o for o in given if not o.startswith("hydra")]
            return [[*run, *shared] for run in base.hydra.sweeper.runs]
        params = base.hydra.sweeper.get("params") or {}
        texts = [f"{key}={value}" for key, value in params.items()]
        named = {text.split("=")[0] for text in given}
        texts = [text for text in texts if text.split("=")[0] not in named] + given
        choices: list[list[str]] = []
        for parsed in parser.parse_overrides(texts):
            if parsed.is_sweep_override():
                key = parsed.get_key_element()
                choices.append([f"{key}={v}" for v in parsed.sweep_string_iterator()])
            else:
                assert parsed.input_line is not None
                choices.append([parsed.input_line])
    methods = next((v for v in choices if v[0].startswith("method=")), [])
    runs: list[list[str]] = []
    for method in methods or [""]:
        # What a method refuses shows only beside that method.
        mine = [[method] if values is methods else values for values in choices]
        first = [values[0] for values in mine]
        runs.append(first)
        for place, values in enumerate(mine):
            runs += [[*first[:place], value, *first[place + 1 :]] for value in values[1:]]
    return runs


def _firsts(overrides: list[str]) -> list[str]:
    """Return the overrides with every sweep reduced to its first value."""
    reduced = []
    for parsed in OverridesParser.create().parse_overrides(overrides):
        if parsed.is_sweep_override():
            value = next(iter(parsed.sweep_string_iterator()))
            reduced.append(f"{parsed.get_key_element()}={value}")
        else:
            assert parsed.input_line is not None
            reduced.append(parsed.input_line)
    return reduced


@contextmanager
def plainly(overrides: list[str]) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's complaints inside the block into one-sentence `UserError`s."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    except MissingConfigException as error:
        raise _no_such_choice(error) from None
    except OverrideParseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.override}: cannot be read as KEY=VALUE ({reason})") from None
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        raise _bad_key(error, overrides) from None


def _no_such_choice(error: MissingConfigException) -> UserError:
    """Name the group, the choice that does not exist, and what does."""
    missing = error.missing_cfg_file or ""
    group, _, name = str(missing).rpartition("/")
    return unknown(group.strip("/") or "config", name, error.options or [])


def _bad_key(error: Exception, overrides: list[str]) -> UserError:
    """Name the override whose key does not exist and the nearest key that does."""
    text = " ".join(str(error).split())
    found = re.search(
        r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
    )
    if found is None:
        return UserError(text.split(" full_key:")[0])
    key = found.group(1)
    without = [o for o in overrides if not o.lstrip("+~").startswith(key)]
    known = _keys(without)
    hints = nearest(key, known)
    parent = key.rpartition(".")[0]
    siblings = sorted({k for k in known if k.rpartition(".")[0] == parent})
    if parent.startswith("method.") and not siblings:
        name = parent.split(".")[1]
        return UserError(f"{key} is set but {name!r} is not among the methods: add method={name}")
    hint = f"did you mean {hints!r}? " if hints else ""
    return UserError(f"unknown key {key!r}: {hint}allowed here: {', '.join(siblings) or 'nothing'}")


def _keys(overrides: list[str]) -> list[str]:
    """Return every dotted key of the config that the other overrides compose."""
    singles = _firsts([o for o in overrides if not o.startswith("-")])
    try:
        with hydra_tree():
            composed = hydra_compose("config", overrides=singles)
    except (HydraException, OmegaConfBaseException):
        with hydra_tree():
            composed = hydra_compose("config")
    return list(_walk(OmegaConf.to_container(composed, resolve=False), ""))


def _walk(node: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted key of every node below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                yield from _walk(value, f"{prefix}{key}.")
