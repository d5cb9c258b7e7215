"""What `model=` accepts besides a name in conf/model: a hub id, a folder, a GGUF file, torchvision.

Hydra looks a choice up in its sources of configs, in order. `ModelNames` is the last of them: it
answers for a value of the group `model` that no file defines, with the config of `model=hub`,
`model=local` or `model=torchvision` and the value in its place. Sweeps, launchers and recorded
commands therefore treat such a value like any other choice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from bench.security import CONFIG_DIR

GROUP = "model"
ACCEPTED = "a hub id as ORG/NAME, a model folder, FILE.gguf, or torchvision/NAME"
SCHEME = "slimbench-models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TORCHVISION = "torchvision/"


def model_config(value: str) -> dict[str, object] | None:
    """Return the config that a value of `model=` stands for; None if it is no such value.

    Like transformers, it takes a folder for a folder even where a hub id has the same form.
    """
    if value.startswith(_TORCHVISION):
        architecture = value.removeprefix(_TORCHVISION)
        return _shipped("torchvision", name=value, source=f"torchvision:{architecture}")
    if _is_path(value):
        return _shipped("local", name=_path_name(Path(value)), path=value)
    if _HUB_ID.fullmatch(value):
        return _shipped("hub", name=value, source=value)
    return None


def is_own_path(value: str) -> bool:
    """Return whether a value is a path, and no choice that Hydra would find in its config tree."""
    return _is_path(value) and not (CONFIG_DIR / GROUP / f"{value}.yaml").is_file()


def _is_path(value: str) -> bool:
    # What is written as a path is taken for one whether or not it exists: the sentence about a
    # missing file is then about that file, and not about names of models.
    if value.endswith(".gguf") or value.startswith(("./", "../", "/", "~")) or value in (".", ".."):
        return True
    folder = Path(value)
    return folder.is_dir() and ("/" in value or (folder / "config.json").is_file())


def _path_name(path: Path) -> str:
    """Return the name under which tables and figures show a model folder or file."""
    # Normalised as text only: a link is shown under the name that the user gave.
    whole = Path(os.path.normpath(path.expanduser().absolute()))
    return whole.stem if whole.suffix == ".gguf" else whole.name


def _shipped(file: str, **changed: object) -> dict[str, object]:
    config = OmegaConf.load(CONFIG_DIR / GROUP / f"{file}.yaml")
    # Unresolved: `seed` and the like are interpolations of the run's config.
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()} | changed


class ModelNames(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for models that have no file in conf/model."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `model/VALUE`."""
        config = model_config(_value(config_path) or "")
        assert config is not None  # Hydra asks `is_config` first
        return ConfigResult(
            provider=self.provider,
            path=f"{SCHEME}://",
            config=OmegaConf.create(config),
            header={"package": None},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `model/VALUE` with a value that stands for a model."""
        value = _value(config_path)
        return value is not None and model_config(value) is not None

    def is_group(self, config_path: str) -> bool:
        """Return False: the values cannot be listed."""
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing, so that names in conf/model stay the only ones that are listed."""
        return []

    def available(self) -> bool:
        """Return True: there is nothing that could be missing."""
        return True


def _value(config_path: str) -> str | None:
    group, slash, value = config_path.partition("/")
    return value if group == GROUP and slash else None
