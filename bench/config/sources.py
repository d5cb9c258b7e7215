"""Sources of Hydra configs without a file: models by hub id or path, and methods of plug-ins.

`model=` accepts more than the names in conf/model: a hub id, a folder, a GGUF file, torchvision.
Hydra looks up a choice in its config sources, the last of which is `ModelNames`. For a value of the
group `model` without a file, it returns the config of `model=hub`, `model=local` or
`model=torchvision` with this value. For sweeps and records it is a choice like any other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from bench import plugins
from bench.config.run_config import method_class
from bench.method import RecipeConfig
from bench.security import CONFIG_DIR

MODELS, METHODS = "model", "method"
"""The config groups of these sources."""
_MODEL_SCHEME, _METHOD_SCHEME = "slimbench-models", "slimbench-methods"
ACCEPTED = "a hub id as ORG/NAME, a model folder, FILE.gguf, or torchvision/NAME"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TORCHVISION = "torchvision/"
_WITH_REVISION = re.compile(rf"({_HUB_ID.pattern}|\w[\w.-]*)[@:](\w[\w./-]*)")
_ADDRESS = re.compile(
    rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(?:models/)?({_HUB_ID.pattern})"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+).*|@([\w.-]+))?/?"
)


def model_config(value: str) -> dict[str, object] | None:
    """Return the config for a value of `model=`, None if the value is not a model.

    As in transformers, an existing folder takes precedence over a hub id of the same form.
    """
    if value.startswith(_TORCHVISION):
        architecture = value.removeprefix(_TORCHVISION)
        return _shipped(MODELS, "torchvision", name=value, source=f"torchvision:{architecture}")
    if _is_path(value):
        return _shipped(MODELS, "local", name=_path_name(Path(value)), path=value)
    if _HUB_ID.fullmatch(value):
        return _shipped(MODELS, "hub", name=value, source=value)
    return None


def correction(value: str) -> str | None:
    """Return the correct form for a model that was given with its revision or as a URL."""
    found = _ADDRESS.fullmatch(value) or _WITH_REVISION.fullmatch(value)
    if found is None:
        return None
    name, *revisions = found.groups()
    revision = next(filter(None, revisions), None)
    return f"model={name}" + (f" model.revision={revision}" if revision else "")


def is_own_path(value: str) -> bool:
    """Return whether a value is a path instead of a choice in Hydra's config tree."""
    return _is_path(value) and not (CONFIG_DIR / MODELS / f"{value}.yaml").is_file()


def _is_path(value: str) -> bool:
    # A value in the form of a path counts as one even if it does not exist, so that the error is
    # about a missing file instead of an unknown model.
    if value.endswith(".gguf") or value.startswith(("./", "../", "/", "~")) or value in (".", ".."):
        return True
    folder = Path(value)
    return folder.is_dir() and ("/" in value or (folder / "config.json").is_file())


def _path_name(path: Path) -> str:
    """Return the name of a model folder or file in tables and figures."""
    # Normalised as text only, because a link is shown under the name that the user gave.
    absolute = Path(os.path.normpath(path.expanduser().absolute()))
    return absolute.stem if absolute.suffix == ".gguf" else absolute.name


def _shipped(group: str, file: str, **changed: object) -> dict[str, object]:
    config = OmegaConf.load(CONFIG_DIR / group / f"{file}.yaml")
    # Unresolved, because `seed` and others are interpolations of the run's config.
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()} | changed


def method_config(name: str, target: str) -> dict[str, object]:
    """Return the config of a method that a plug-in declares by its class.

    Every field is a knob with the class's default. As in the shipped configs, `ratio` and, in a
    method that trains a classifier by the run's recipe, the recipe, the unit of the ratio and the
    images are those of the run.
    """
    path = target.replace(":", ".")
    kind = method_class(name, path)
    knobs = kind.model_construct().model_dump(mode="json")
    required = {key: "???" for key, field in kind.model_fields.items() if field.is_required()}
    recipe = kind.model_fields.get("recipe")
    shared = _shipped(METHODS, "_group_training")
    if recipe is not None and recipe.annotation is RecipeConfig:
        shared |= _shipped(METHODS, "_training")
    else:
        shared = {"ratio": shared["ratio"]}
    followed = {
        key: value for key, value in shared.items() if key in kind.model_fields and _follows(value)
    }
    return {"_target_": path, **required, **knobs, **followed}


def _follows(value: object) -> bool:
    """Return whether a value is that of the run, by an interpolation."""
    return "${" in str(value)


class ModelNames(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for models that have no file in conf/model."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return _MODEL_SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `model/VALUE`."""
        config = model_config(_value(config_path) or "")
        assert config is not None  # Hydra calls `is_config` first.
        return ConfigResult(
            provider=self.provider,
            path=f"{_MODEL_SCHEME}://",
            config=OmegaConf.create(config),
            header={"package": None},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `model/VALUE` with a valid value."""
        value = _value(config_path)
        return value is not None and model_config(value) is not None

    def is_group(self, config_path: str) -> bool:
        """Return False: the values cannot be listed."""
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing, so that only names in conf/model are listed."""
        return []

    def available(self) -> bool:
        """Return True, because nothing can be missing."""
        return True


def _value(config_path: str) -> str | None:
    group, slash, value = config_path.partition("/")
    return value if group == MODELS and slash else None


class PluginMethods(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for methods that plug-ins declare without a file."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return _METHOD_SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `method/NAME`."""
        name = _plugin_method(config_path)
        assert name is not None  # Hydra calls `is_config` first.
        return ConfigResult(
            provider=self.provider,
            path=f"{_METHOD_SCHEME}://",
            config=OmegaConf.create(method_config(name, plugins.active().methods[name])),
            header={"package": f"{METHODS}.{name}"},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `method/NAME` with the name of a plug-in's method."""
        return _plugin_method(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group of methods, the only one with configs of this source."""
        return config_path.strip("/") == METHODS and bool(plugins.active().methods)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of the methods."""
        listed = self.is_group(config_path) and results_filter != ObjectType.GROUP
        return sorted(plugins.active().methods) if listed else []

    def available(self) -> bool:
        """Return True, because nothing can be missing."""
        return True


def _plugin_method(config_path: str) -> str | None:
    group, _, name = config_path.strip("/").removesuffix(".yaml").partition("/")
    return name if group == METHODS and name in plugins.active().methods else None


class SearchPath(SearchPathPlugin):  # type: ignore[misc]  # Hydra has no types
    """Hydra's search path after the shipped configs: plug-ins, then names of models without files.

    The shipped files come first, so that plug-ins cannot replace them.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append one source per folder of a plug-in, then the two without files."""
        for folder in plugins.active().configs:
            search_path.append(provider="plug-in", path=f"file://{folder}")
        search_path.append(provider="plug-in", path=f"{_METHOD_SCHEME}://")
        search_path.append(provider="slimbench", path=f"{_MODEL_SCHEME}://")
