"""Configs of plug-ins in Hydra's search path: their folders, and classes without a config file."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from bench import plugins
from bench.config import overrides
from bench.config.run_config import method_class

GROUP = "method"
_SCHEME = "slimbench-methods"


def method_config(name: str, target: str) -> dict[str, object]:
    """Return the config of a method that a plug-in declares by its class.

    Every field is a knob with the class's default; `ratio` follows that of the run, as in the
    shipped configs.
    """
    path = target.replace(":", ".")
    kind = method_class(name, path)
    knobs = kind.model_construct().model_dump(mode="json")
    required = {key: "???" for key, field in kind.model_fields.items() if field.is_required()}
    followed = {"ratio": "${ratio}"} if "ratio" in kind.model_fields else {}
    return {"_target_": path, **required, **knobs, **followed}


class PluginMethods(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for methods that plug-ins declare without a file."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `method/NAME`."""
        name = _name(config_path)
        assert name is not None  # Hydra asks `is_config` first
        return ConfigResult(
            provider=self.provider,
            path=f"{_SCHEME}://",
            config=OmegaConf.create(method_config(name, plugins.active().methods[name])),
            header={"package": f"{GROUP}.{name}"},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `method/NAME` with the name of a plug-in's method."""
        return _name(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group of methods, of which this source has any."""
        return config_path.strip("/") == GROUP and bool(plugins.active().methods)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of the methods."""
        listed = self.is_group(config_path) and results_filter != ObjectType.GROUP
        return sorted(plugins.active().methods) if listed else []

    def available(self) -> bool:
        """Return True: there is nothing that could be missing."""
        return True


def _name(config_path: str) -> str | None:
    group, _, name = config_path.strip("/").removesuffix(".yaml").partition("/")
    return name if group == GROUP and name in plugins.active().methods else None


class SearchPath(SearchPathPlugin):  # type: ignore[misc]  # Hydra has no types
    """Hydra's search path after the shipped configs: plug-ins, then names that stand for models.

    The shipped files come first, so that no plug-in replaces one.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append one source per folder of a plug-in, then the two without files."""
        for folder in plugins.active().configs:
            search_path.append(provider="plug-in", path=f"file://{folder}")
        search_path.append(provider="plug-in", path=f"{_SCHEME}://")
        search_path.append(provider="slimbench", path=f"{overrides.SCHEME}://")
