"""From command-line overrides to a validated config, with actionable errors.

Hydra's own exceptions are precise but long; `hydra_errors_as_user_errors` turns each into one
sentence with the nearest match. The end of the module has the configs that plug-ins add to Hydra's
search path: their folders, and classes without a config file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from bench import plugins
from bench.config.gate import check_overrides, refuse_packages_of_files
from bench.config.overrides import (
    ACCEPTED,
    GROUP,
    SCHEME,
    Overrides,
    correction,
    parse_error,
    shipped_config,
    sweep_values,
    text_of,
)
from bench.config.run_config import RunConfig, method_config, validated
from bench.errors import UserError, nearest, unknown_name
from bench.security import CONFIG_DIR, refuse_shadowed_packages


@contextmanager
def hydra_config_tree() -> Iterator[ConfigLoader]:
    """Open the shipped config tree for the compose API and close it again."""
    # Hydra's state is a process-wide singleton and refuses a second initialisation, for example
    # after an error or in a notebook.
    GlobalHydra.instance().clear()
    refuse_shadowed_packages()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def compose_run_config(overrides: Sequence[str]) -> RunConfig:
    """Compose and validate the config of one run; raises `UserError` if it is wrong."""
    with hydra_errors_as_user_errors(overrides), hydra_config_tree() as loader:
        check_overrides(Overrides.parse(overrides))
        refuse_choices(Overrides.parse(overrides), loader)
        composed = hydra_compose("config", overrides=list(overrides))
        refuse_empty_mappings(Overrides.parse(overrides), composed)
        packages = OmegaConf.select(composed, "packages")
        refuse_packages_of_files(packages, Overrides.parse(overrides))
        return validated(composed)


def compose_section(group: str, name: str) -> DictConfig:
    """Compose one config of a group alone, as a tree below `group`."""
    file = CONFIG_DIR / group / f"{name}.yaml"
    own = OmegaConf.load(file) if file.is_file() else None
    # Hydra also composes its own config, which takes ten times as long. It is needed only for files
    # that extend others, and for those of other packages.
    if own is not None and "defaults" not in own:
        return OmegaConf.create({group: own})
    with hydra_config_tree():
        composed: DictConfig = hydra_compose(f"{group}/{name}")
    return composed


LIST_GROUPS = ("method",)
"""Config groups of which a run may have several choices."""


def refuse_choices(overrides: Overrides, loader: ConfigLoader) -> None:
    """Raise if a run names two choices of which only one can be meant, or a part of other configs.

    Hydra would silently apply a method once if it is named twice, and use the last of two models.
    """
    chosen: dict[str, str] = {}
    for override in overrides.parsed:
        group, text = override.key_or_group, text_of(override)
        options = loader.get_group_options(group)
        if override.is_sweep_override() or not options:
            continue
        if group in chosen:
            raise UserError(f"{chosen[group]} and {text} choose {group} twice: give one of them")
        chosen[group] = text
        value = override.value()
        names = [str(name) for name in value] if isinstance(value, list) else [str(value)]
        part = next((name for name in names if _is_part(name) and name in options), None)
        if part is not None:
            raise unknown_name(group, part, _selectable(options))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{text} names {twice} twice: name it once")
        if len(names) > 1 and group not in LIST_GROUPS:
            raise UserError(
                f"{text}: a run has one {group}: give one, or sweep them with "
                f"-m {group}={','.join(names)}"
            )


def refuse_empty_mappings(overrides: Overrides, composed: DictConfig) -> None:
    """Raise for `KEY={}` if the key has entries, because merging keeps all of them."""
    for override in overrides.parsed:
        key = override.key_or_group
        if override.is_sweep_override() or override.is_delete() or override.value() != {}:
            continue
        node = OmegaConf.select(composed, key, throw_on_missing=False)
        if isinstance(node, DictConfig) and len(node):
            raise UserError(
                f"{text_of(override)} removes nothing, because a mapping is merged with the "
                f"existing one: ~{key} removes it with all entries ({', '.join(map(str, node))})"
            )


def config_names(group: str) -> list[str]:
    """Return the names in a config group (`model`, `method`, ...), including those of plug-ins.

    Files named `_NAME` are parts of other files.
    """
    return [name for name in _choices(group) if name != "dense"]


def _choices(group: str) -> list[str]:
    with hydra_config_tree() as loader:
        return _selectable(loader.get_group_options(group))


def _selectable(options: Iterable[str]) -> list[str]:
    return sorted(name for name in options if not _is_part(name))


def _is_part(name: str) -> bool:
    return name.startswith("_")


@contextmanager
def hydra_errors_as_user_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Convert exceptions of Hydra and OmegaConf inside the block into one-sentence `UserError`s."""
    # Otherwise Hydra prints its own abridged traceback and calls sys.exit instead of raising.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    except MissingConfigException as error:
        raise _unknown_choice(error) from None
    except OverrideParseException as error:
        raise parse_error(error) from None
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: give {error.full_key}=...") from None
    except InterpolationResolutionError as error:
        raise _unresolved(error, overrides) from None
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        raise _unknown_key(error, overrides) from None
    except (ValueError, TypeError) as error:
        if (refused := _not_a_choice(error, overrides)) is None:
            raise
        raise refused from None


def _not_a_choice(error: Exception, overrides: Sequence[str]) -> UserError | None:
    """Build the error for a group whose choice is a number or null; None for other errors."""
    # The message of Hydra 1.3, as in `_unknown_key`, which also fails on choices in a list.
    if not str(error).startswith(("Config group override must be", *_NOT_A_TEXT)):
        return None
    for override in Overrides.parse(overrides).parsed:
        key, text = override.key_or_group, text_of(override)
        if override.is_sweep_override():
            if "null" in sweep_values(override) and _choices(key):
                allowed = ", ".join(_choices(key))
                return UserError(f"{text}: null is not a choice of a sweep: allowed: {allowed}")
            continue
        value = override.value()
        listed = value if isinstance(value, list) else [value]
        if isinstance(value, dict) or all(isinstance(name, str) for name in listed):
            continue
        if key == "method":
            names = "method=[camera_p,camera_q], or method=[] for the dense model"
            return UserError(f"{text} names no method: give names, as in {names}")
        if "." not in key and _choices(key):
            return UserError(f"{text} is not a choice: allowed: {', '.join(_choices(key))}")
    return None


_NOT_A_TEXT = ("argument of type", "can only concatenate str")


def _unknown_choice(error: MissingConfigException) -> UserError:
    missing = error.missing_cfg_file or ""
    group, _, name = str(missing).removeprefix("/").rpartition("/")
    if group and not name:
        allowed = ", ".join(_selectable(error.options or []))
        return UserError(f"{group}= is empty, as an unset shell variable is: allowed: {allowed}")
    # Hydra treats the first part of `organisation/name` as a subfolder of the group.
    while "/" in group and not _choices(group):
        group, _, folder = group.rpartition("/")
        name = f"{folder}/{name}"
    if group == GROUP and (right := correction(name)) is not None:
        return UserError(f"model={name} is not the name of a model: write {right}")
    known = str(unknown_name(group or "config", name, _selectable(error.options or [])))
    if group == GROUP:
        known += f"; or {ACCEPTED}"
    # The file is not read, so nobody knows whether it has this name.
    if (file := plugins.untrusted_project()) is not None:
        known += f"; if {file} adds {name!r}, allow it with `bench trust`"
    return UserError(known)


def _unresolved(error: InterpolationResolutionError, overrides: Sequence[str]) -> UserError:
    """Build the error for a value with a reference that cannot be resolved."""
    given = Overrides.parse(overrides).setting(str(error.full_key))
    place = given[-1] if given else str(error.full_key)
    # The messages of OmegaConf 2.3; others are passed on unchanged.
    reason = str(error).splitlines()[0]
    if (missing := re.fullmatch(r"Interpolation key '(.*)' not found", reason)) is not None:
        close = nearest(missing[1], _known_keys([]))
        hint = f"did you mean ${{{close}}}?" if close else "keys are such as ${seed}"
        return UserError(f"{place}: there is no key {missing[1]!r} to refer to: {hint}")
    if (unset := re.search(r"Environment variable '(\w+)' not found", reason)) is not None:
        return UserError(
            f"{place}: the environment variable {unset[1]} is not set: export it, or give another "
            f"value as ${{oc.env:{unset[1]},VALUE}}"
        )
    if "HydraConfig was not set" in reason:
        return UserError(f"{place}: a run's config cannot refer to Hydra's own")
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason)
    return UserError(f"{place} cannot be resolved: {reason[:1].lower()}{reason[1:]}")


def _unknown_key(error: Exception, overrides: Sequence[str]) -> UserError:
    """Build the error for an override whose key Hydra refuses."""
    text = " ".join(str(error).split())
    # Matches the English messages of Hydra 1.3 (pinned below 1.4), which have no structured key. If
    # the messages change, Hydra's own sentence is used, without a suggestion.
    found = re.search(
        r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
    )
    if found is None:
        text = text.split(" full_key:")[0]
        refused = re.fullmatch(r"Error merging override (.*)", text)
        if refused is None or error.__cause__ is None:
            return UserError(text)
        reason = str(error.__cause__).splitlines()[0]
        return UserError(f"{refused[1]}: {reason[:1].lower()}{reason[1:]}")
    key, parsed = found.group(1), Overrides.parse(overrides)
    misused = _misused_key(key, parsed) or _of_one_swept_method(key, parsed)
    return misused or _missing_key(key, parsed)


def _misused_key(key: str, overrides: Overrides) -> UserError | None:
    """Return the error for a key that exists, and None for an unknown one."""
    for override in overrides.parsed:
        if override.is_add() and override.key_or_group == key:
            text = text_of(override)
            return UserError(f"{text} adds a key that exists: write {text.removeprefix('+')}")
        # Only a group has choices; values below it may be mappings.
        if override.key_or_group == key and "." not in key and isinstance(override.value(), dict):
            return UserError(
                f"{text_of(override)} is a mapping where a name is needed: write {key}=NAME, and "
                "what to change in it by dotted keys, as in method.camera_p.ratio=0.4"
            )
    return None


def _missing_key(key: str, overrides: Overrides) -> UserError:
    """Build the error for a key that does not exist, with what exists in its place."""
    # The existing keys are found by composing again without the wrong override.
    known = _known_keys(overrides.without(key).first_values())
    hints = nearest(key, known)
    parent = key.rpartition(".")[0]
    siblings = _keys_of(parent, known)
    if parent.startswith("method.") and not siblings:
        name = parent.split(".")[1]
        return UserError(f"{key} is set but method={name} was not selected: add method={name}")
    hint = _owners_hint(key) or (f"did you mean {hints!r}? " if hints else "")
    given = overrides.setting(key)
    if parent in OPEN_MAPPINGS and given and hints not in siblings:
        others = f"{parent} has {', '.join(siblings)}" if siblings else f"{parent} is empty"
        return UserError(f"{given[0]} is new, and {others}: write +{given[0]} to add it")
    # If the section itself is missing (benchmark.images of a text benchmark), it has no keys.
    while not siblings and parent not in known:
        parent = parent.rpartition(".")[0]
        siblings = _keys_of(parent, known)
    return UserError(f"unknown key {key!r}: {hint}allowed here: {', '.join(siblings) or 'nothing'}")


def _owners_hint(key: str) -> str | None:
    """Return which other choices of the key's group have it, None if none has."""
    group, _, rest = key.partition(".")
    # The keys of a method are below its name, which says whose they are.
    if group in LIST_GROUPS:
        return None
    owners = [name for name in _choices(group) if _has_key(group, name, rest)]
    if not owners:
        return None
    more = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
    return f"it is a key of {group}={f', {group}='.join(owners[:3])}{more}; "


def _has_key(group: str, name: str, key: str) -> bool:
    # A plug-in's choice has no shipped file. What a file inherits is in the one that it extends.
    is_shipped = (CONFIG_DIR / group / f"{name}.yaml").is_file()
    return is_shipped and key in _node_keys(shipped_config(group, name), "")


def _of_one_swept_method(key: str, overrides: Overrides) -> UserError | None:
    """Build the error for a knob of one method in a sweep over several; None for other keys."""
    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    swept = (o for o in overrides.parsed if o.key_or_group == group and o.is_sweep_override())
    if group != "method" or not any(name in re.findall(r"\w+", text_of(o)) for o in swept):
        return None
    return UserError(
        f"{key} is set for every method of the sweep, but only {name} has it: sweep {name} in a "
        "separate command, or list all runs with hydra/sweeper=list (docs/tables.md)"
    )


def _keys_of(parent: str, known: Sequence[str]) -> list[str]:
    return sorted({key for key in known if key.rpartition(".")[0] == parent})


OPEN_MAPPINGS = frozenset(
    f"benchmark.{name}"
    for name in ("metrics", "perplexity", "data", "chat_template_args", "gen_kwargs")
)
"""Keys with entries named by the user: tasks, texts, and arguments of the user's functions."""


def _known_keys(overrides: list[str]) -> list[str]:
    """Return every dotted key of the config composed from these overrides."""
    try:
        with hydra_config_tree():
            composed = hydra_compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException):
        with hydra_config_tree():
            composed = hydra_compose("config")
    return list(_node_keys(OmegaConf.to_container(composed, resolve=False), ""))


def _node_keys(node: object, prefix: str) -> Iterator[str]:
    """Yield the dotted key of every node below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                yield from _node_keys(value, f"{prefix}{key}.")


_METHODS = "method"
_PLUGIN_SCHEME = "slimbench-methods"


class PluginMethods(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for methods that plug-ins declare without a file."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return _PLUGIN_SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `method/NAME`."""
        name = _plugin_method(config_path)
        assert name is not None  # Hydra calls `is_config` first.
        return ConfigResult(
            provider=self.provider,
            path=f"{_PLUGIN_SCHEME}://",
            config=OmegaConf.create(method_config(name, plugins.active().methods[name])),
            header={"package": f"{_METHODS}.{name}"},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `method/NAME` with the name of a plug-in's method."""
        return _plugin_method(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group of methods, the only one with configs of this source."""
        return config_path.strip("/") == _METHODS and bool(plugins.active().methods)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of the methods."""
        listed = self.is_group(config_path) and results_filter != ObjectType.GROUP
        return sorted(plugins.active().methods) if listed else []

    def available(self) -> bool:
        """Return True, because nothing can be missing."""
        return True


def _plugin_method(config_path: str) -> str | None:
    group, _, name = config_path.strip("/").removesuffix(".yaml").partition("/")
    return name if group == _METHODS and name in plugins.active().methods else None


class SearchPath(SearchPathPlugin):  # type: ignore[misc]  # Hydra has no types
    """Hydra's search path after the shipped configs: plug-ins, then names of models without files.

    The shipped files come first, so that plug-ins cannot replace them.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append one source per folder of a plug-in, then the two without files."""
        for folder in plugins.active().configs:
            search_path.append(provider="plug-in", path=f"file://{folder}")
        search_path.append(provider="plug-in", path=f"{_PLUGIN_SCHEME}://")
        search_path.append(provider="slimbench", path=f"{SCHEME}://")
