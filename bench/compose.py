"""From command-line overrides to a validated config, with errors that a user can act on.

Hydra's own exceptions are precise but long; `plainly` turns each into one sentence with the
nearest match.
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
from hydra.core.override_parser.types import Override, ValueType
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
from bench.secrets import hide

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
    """Resolve a composed config and validate it; a secret in it is refused, so none leaks."""
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    _refuse_secrets(plain)
    return validate({str(key): value for key, value in plain.items()})


def _refuse_secrets(plain: dict[Any, Any]) -> None:
    """Raise when a value is a password or token of the user: a record would keep it."""
    together = "\n".join(str(value) for _, value in _leaves(plain, ""))
    if hide(together) == together:
        return
    key = next(key for key, value in _leaves(plain, "") if hide(str(value)) != str(value))
    raise UserError(f"{key} holds a password or token of yours, which a record would keep")


def options(group: str) -> list[str]:
    """Return the names in one config group (`model`, `method`, ...), third parties' included.

    Files named `_NAME` are parts of others.
    """
    with hydra_tree() as loader:
        names = loader.get_group_options(group)
    return sorted(name for name in names if name != "dense" and not name.startswith("_"))


def firsts(overrides: list[str]) -> list[str]:
    """Return the overrides with every sweep reduced to its first value."""
    reduced = []
    for parsed in OverridesParser.create().parse_overrides(overrides):
        if parsed.is_sweep_override():
            reduced.append(f"{parsed.get_key_element()}={next(values_of(parsed))}")
        else:
            assert parsed.input_line is not None
            reduced.append(parsed.input_line)
    return reduced


def values_of(parsed: Override) -> Iterator[str]:
    """Yield what a sweep may set a key to; of an interval its two ends."""
    if parsed.value_type == ValueType.INTERVAL_SWEEP:
        interval = parsed.value()
        yield from (str(interval.start), str(interval.end))
    else:
        yield from map(str, parsed.sweep_string_iterator())


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
    singles = firsts([o for o in overrides if not o.startswith("-")])
    try:
        with hydra_tree():
            composed = hydra_compose("config", overrides=singles)
    except (HydraException, OmegaConfBaseException):
        with hydra_tree():
            composed = hydra_compose("config")
    return list(_walk(OmegaConf.to_container(composed, resolve=False), ""))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key that holds a value, with the value."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield prefix.rstrip("."), node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}{key}.")


def _walk(node: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted key of every node below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                yield from _walk(value, f"{prefix}{key}.")
