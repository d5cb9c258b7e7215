"""What a config may contain, whoever wrote it, and what only the user may allow.

Command lines, sweep plans, lists of runs and records become configs only through these checks.
Anything that runs other code, reads configs from elsewhere or sends results to others counts only
if it is in the current command: a plan or a record may request it, but not allow it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, ValueType
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bench import plugins
from bench.config.overrides import GROUP, Overrides, is_own_path, sets, sweep_values, text_of
from bench.errors import UserError
from bench.security import package_exists, refuse_foreign_code, refuse_secret

HYDRA_KEYS = (
    "hydra.launcher", "hydra.sweeper", "hydra.mode", "hydra.searchpath", "hydra.verbose",
)  # fmt: skip
"""The part of Hydra's own config that can be set."""
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
SHIPPED_HYDRA: dict[str, object] = {
    "callbacks": {},
    "env": {},
    "hydra_logging": _NO_LOGGING,
    "job_logging": _NO_LOGGING,
    "output_subdir": None,
    "run.dir": "${results_dir}",
    "sweep.dir": "${results_dir}/sweeps/unnamed",
    "sweep.subdir": "jobs",
    "job.chdir": None,
    "job.env_set": {},
    "job.env_copy": [],
}
"""The part that affects this machine: classes, files, folders and the environment. It always has
its shipped values, even if a file of a search path changes it."""
PLUGIN_PACKAGES = ("hydra_plugins", "hydra")
"""Packages of launchers and sweepers; Hydra starts only classes that it found there itself."""
RESOLVERS = frozenset({"hydra", "now", "oc.deprecated", "oc.env", "oc.select", "python_version"})
"""Resolvers that look up a value. `oc.create` and similar ones build nodes, which could name code,
after all checks."""

WIDENING_KEYS = (
    "packages", "hydra.searchpath", "model.trust_remote_code", "benchmark.trust_code",
    "tracker.entity", "hydra.sweeper.max_jobs",
)  # fmt: skip
"""Keys with which code may run, results leave the machine, or a sweep may exceed its limits."""
LAUNCHER_LIMITS = frozenset({
    "jobs", "devices", "timeout_min", "mem_gb", "num_cpus", "cpus_per_job", "gpus_per_job",
    "parallel", "max_num_timeout", "signal_delay_s", "nodes", "tasks_per_node", "gpus_per_node",
    "cpus_per_task", "stderr_to_stdout",
})  # fmt: skip
"""Settings of launchers that are only numbers; others affect a shell or another machine."""
_NAME = re.compile(r"[\w+-][\w.+-]*")


def check_overrides(overrides: Overrides) -> None:
    """Check the arguments of a command, typed or stored, before anything is composed from them.

    Raises:
        UserError: an override sets a part of Hydra's config that cannot be set, names a file
            outside the config groups, allows remote code, or contains a secret.
    """
    for override in _single_values(overrides.parsed):
        text = text_of(override)
        refuse_secret(text, override.key_or_group)
        _refuse_node_resolvers(text, text)
        # Checked before composition, after which the origin of a value is unknown.
        if sets(override, "model.allow_remote_code"):
            raise UserError(
                f"{text}: only a file in conf/model may allow a model to run its own code"
            )
        if _is_hydras(override.package or ""):
            raise UserError(f"{text}: a config group has no place in Hydra's own config")
        if override.is_delete() and _is_hydras(override.key_or_group):
            raise UserError(f"{text}: Hydra's own config can be set, and not deleted")
        leaves = dict(_leaves(override))
        for key in leaves:
            if _is_hydras(key) and not any(_is_below(key, allowed) for allowed in HYDRA_KEYS):
                raise _not_settable(text)
        for key, value in leaves.items():
            _check_hydra_value(key, value, text)
        # Only keys with a dot, and the results folder, have values; all others may select a file.
        if "." in override.key_or_group or override.key_or_group == "results_dir":
            continue
        values = [str(value) for value in leaves.values()]
        # A user's folder or file may replace a choice.
        if override.key_or_group == GROUP:
            values = [value for value in values if not is_own_path(value)]
        if any(".." in value.split("/") for value in values):
            raise UserError(f"{text}: a choice must be inside its config group, so `..` is refused")


def _check_hydra_value(key: str, value: object, text: str) -> None:
    """Raise for a setting that Hydra would ignore, or refuse with a less helpful message."""
    if key == "hydra.mode" and value is not None and str(value) not in RunMode.__members__:
        raise UserError(f"{text}: allowed: {', '.join(RunMode.__members__)}; -m asks for a sweep")
    if key == "hydra.verbose" and not isinstance(value, bool | str):
        raise UserError(f"{text}: give true, or the names of loggers, as in hydra.verbose=[bench]")
    # A list has a leaf per entry, hydra.searchpath.0 and so on, and an empty one is a leaf {}.
    if not _is_below(key, "hydra.searchpath") or value == {}:
        return
    if key == "hydra.searchpath" or not isinstance(value, str):
        raise UserError(
            f"{text}: give a list of folders and packages, as in "
            "hydra.searchpath=[pkg://your_package.conf]"
        )
    scheme, separator, place = value.partition("://")
    if "${" in value:
        return  # Known after composition.
    if separator and scheme not in ("file", "pkg"):
        raise UserError(f"{text}: {scheme}:// cannot be read: give file://FOLDER or pkg://PACKAGE")
    if scheme == "pkg" and separator:
        # Only the first part, because finding the rest would import it.
        if not package_exists(place.partition(".")[0]):
            raise UserError(f"{text}: there is no package {place!r}: install it first")
    elif not Path(place if separator else value).is_dir():
        raise UserError(f"{text}: {value} is not a folder")


def check_run_overrides(overrides: Sequence[str]) -> Overrides:
    """Check and return the overrides of one run of a sweep, which must not set Hydra's config."""
    parsed = Overrides.parse(overrides)
    check_overrides(parsed)
    if parsed.of_hydra:
        raise UserError(
            f"{parsed.of_hydra[0]}: a single run of a sweep cannot change Hydra's own config; "
            "give it to the whole sweep"
        )
    return parsed


def check_composed(composed: DictConfig) -> None:
    """Check a composed config, including Hydra's own part, before Hydra acts on it.

    Raises:
        UserError: it names code outside its packages, or changes what cannot be set.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    for key, value in dotted_leaves(plain, ""):
        _refuse_node_resolvers(key, value)
    own = plain.pop("hydra")
    packages = plain.get("packages")
    refuse_packages_of_files(packages, Overrides.parse(own["overrides"]["task"]))
    # Anything other than a list allows nothing, and validation reports the problem.
    named = packages if isinstance(packages, list) else ()
    refuse_foreign_code(plain, (*named, *plugins.active().packages))
    for key, shipped in SHIPPED_HYDRA.items():
        found = own
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != shipped:
            raise _not_settable(f"hydra.{key}={found}")
    for section in ("launcher", "sweeper"):
        _check_plugin(f"hydra.{section}", own[section], composed)


def refuse_packages_of_files(packages: object, overrides: Overrides) -> None:
    """Raise if a config file, instead of this command, names packages whose code may run."""
    named = map(str, packages) if isinstance(packages, list | ListConfig) else ()
    allowed = {"methods", *plugins.active().packages}
    beyond = [name for name in named if name not in allowed]
    if beyond and overrides.value("packages") is None:
        raise UserError(
            f"packages={packages}: a config file cannot allow code; give packages=[methods,"
            f"{','.join(beyond)}] in the command if you trust it"
        )


def _check_plugin(key: str, node: object, composed: DictConfig) -> None:
    """Check that a launcher or sweeper is one of Hydra's classes with plain settings."""
    if not isinstance(node, dict):
        raise UserError(f"{key}={node}: choose one by hydra/{key.removeprefix('hydra.')}=NAME")
    settings = dict(node)
    target = str(settings.pop("_target_", None))
    if target.partition(".")[0] not in PLUGIN_PACKAGES:
        allowed = ", ".join(PLUGIN_PACKAGES)
        raise UserError(f"{key}._target_={target}: only code from {allowed} may run there")
    # Hydra instantiates whatever names a class in the settings as well.
    refuse_foreign_code(settings, (), key)
    for name, value in dotted_leaves(settings, f"{key}."):
        if not isinstance(value, str) or "${" not in value:
            continue
        try:
            found = OmegaConf.select(composed, name)
        except OmegaConfBaseException:
            # Known only inside a job, such as ${hydra:job.num}, and a value there.
            continue
        if OmegaConf.is_config(found):
            raise UserError(f"{name}={value}: give a value instead of a part of the config")
        refuse_secret(str(found), name)


def check_plan(
    folder: Path, arguments: Overrides, runs: Iterable[Sequence[str]], repeated: Sequence[str]
) -> None:
    """Check the requests of the plan in a sweep's `folder`.

    `runs` are the overrides of its planned or listed runs. `repeated` are arguments of the plan
    that the user repeats in this command and thereby allows.

    Raises:
        UserError: the plan requests what a plan cannot allow, and this command does not allow it.
    """
    check_overrides(arguments)
    # Runs share most of their overrides, and parsing one takes a millisecond.
    parsed = check_run_overrides(list(dict.fromkeys(text for run in runs for text in run)))
    overrides = [*arguments.parsed, *parsed.parsed]
    name, results_dir = folder.name, folder.parent.parent
    for override in overrides:
        if override.key_or_group == "results_dir" and not _is_same_folder(override, results_dir):
            raise UserError(
                f"the plan of sweep {name} in {results_dir} writes to {text_of(override)}: move it "
                "back, or run its command again"
            )
    forbidden = dict.fromkeys(
        text_of(o) for o in overrides if text_of(o) not in repeated and _widens(o)
    )
    if forbidden:
        command = shlex.join(["bench", "resume", name, *dict.fromkeys([*repeated, *forbidden])])
        raise UserError(
            f"the plan of sweep {name} asks for {', '.join(forbidden)}, which no plan can allow: "
            f"if you trust it, give it again: {command}"
        )


def refuse_unplanned(
    folder: Path, arguments: Overrides, runs: Iterable[Sequence[str]], repeated: Sequence[str]
) -> None:
    """Raise if a repeated argument is not in the plan; see `check_plan`."""
    known = {*arguments.texts, *(text for run in runs for text in run)}
    for text in repeated:
        if text not in known:
            raise UserError(
                f"{text} is not in the plan of sweep {folder.name}: resuming changes nothing"
            )


def _is_same_folder(override: Override, folder: Path) -> bool:
    """Return whether an override names a folder, by any path."""
    value = None if override.is_sweep_override() else override.value()
    return value is not None and os.path.realpath(str(value)) == os.path.realpath(folder)


def _widens(override: Override) -> bool:
    """Return whether an override requests something that only the user can allow."""
    for single in _single_values([override]):
        if any(sets(single, key) for key in WIDENING_KEYS):
            return True
        # A resolver reads values from outside the plan, such as environment variables.
        if any(_resolvers(text_of(single))):
            return True
        for key, value in _leaves(single):
            if _is_below(key, "hydra.launcher"):
                setting = key.removeprefix("hydra.launcher").removeprefix(".").partition(".")[0]
                if setting and setting not in LAUNCHER_LIMITS:
                    return True
            # The name of a study is also a file name.
            elif key != "hydra.sweeper.study":
                continue
            if value is not None and not _NAME.fullmatch(str(value)):
                return True
    return False


def _not_settable(text: str) -> UserError:
    return UserError(f"{text}: of Hydra's own config only {', '.join(HYDRA_KEYS)} can be set")


def _is_hydras(key: str) -> bool:
    return _is_below(key, "hydra")


def _is_below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def _single_values(overrides: Iterable[Override]) -> Iterator[Override]:
    """Yield overrides with a single value: one override per mapping of a sweep over mappings."""
    for override in overrides:
        values = list(sweep_values(override)) if _is_choice(override) else []
        if any("{" in value for value in values):
            key = override.get_key_element()
            yield from Overrides.parse([f"{key}={value}" for value in values]).parsed
        else:
            yield override


def _is_choice(override: Override) -> bool:
    """Return whether an override lists its values, unlike a range, which may have billions."""
    return override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP)


def _leaves(override: Override) -> Iterator[tuple[str, object]]:
    """Yield every dotted key that an override sets, with each of its values."""
    key = override.key_or_group.replace("/", ".")
    if _is_choice(override):
        yield from ((key, value) for value in sweep_values(override))
    elif override.is_sweep_override():
        yield key, text_of(override).partition("=")[2]
    else:
        yield from dotted_leaves(override.value(), f"{key}.")


def dotted_leaves(node: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Yield every value of a config with its dotted key; entries of a list have numbers as keys."""
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    if not isinstance(node, dict) or not node:
        yield prefix.rstrip("."), node
        return
    for key, value in node.items():
        yield from dotted_leaves(value, f"{prefix}{key}.")


def _refuse_node_resolvers(key: str, value: object) -> None:
    for name in _resolvers(value):
        if name not in RESOLVERS:
            allowed = ", ".join(sorted(RESOLVERS))
            raise UserError(f"{key}: the resolver {name!r} is not allowed: use one of {allowed}")


def _resolvers(value: object) -> Iterator[str]:
    """Yield the name of every resolver in a text; a computed name is yielded up to its first `$`.

    `${oc.env:HOME}` has one, `${seed}` has none.
    """
    for name, end in re.findall(r"\$\{([^:{}$]*)([:$]?)", value) if isinstance(value, str) else ():
        if end:
            yield name.strip() if end == ":" else f"{name}$"


def plan_arguments(arguments: Sequence[str], name: str) -> Overrides:
    """Read the stored arguments of a plan.

    Raises:
        UserError: they are not arguments of `bench run`.
    """
    try:
        return Overrides.parse(arguments)
    except UserError as error:
        raise UserError(f"the plan of sweep {name} cannot be read: {error}") from None


def listed_runs(composed: DictConfig) -> list[list[str]]:
    """Return the overrides that the sweeper's own config adds to runs, one list per run or key.

    Raises:
        UserError: they are not lists of texts or a mapping of keys to texts.
    """
    sweeper: Any = OmegaConf.to_container(composed.hydra.sweeper, resolve=False)
    found = [
        [str(_typed(text, str, "runs")) for text in _typed(run, list, "runs")]
        for run in _typed(sweeper.get("runs"), list, "runs")
    ]
    for name in ("params", "space"):
        values = _typed(sweeper.get(name), dict, name)
        found += [[f"{key}={text}"] for key, text in values.items()]
    return found


_KINDS: dict[type, str] = {list: "list", dict: "mapping", str: "text"}


def _typed(value: Any, kind: type, name: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise UserError(f"hydra.sweeper.{name}: {value!r} is not a {_KINDS[kind]}")
    return kind() if value is None else value
