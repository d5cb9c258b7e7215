"""Modules of ours in a published network, and their description in a saved folder.

Modules of slimbench that replace modules of a published network.

A method that changes the shape or the storage of weights replaces a module by a `ReplacedModule`.
Its `spec`, a few JSON values, suffices to build it again without weights, so that such a network
can be saved to a folder and loaded like any other.

Description of a network that no longer has its published shape, stored in its folder.

`slimbench.json`, next to the weights, names every module that replaces a published one and how it
is built; the weights are in safetensors under the names of these modules. A folder without that
file is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from torch import nn

from bench.errors import UserError
from bench.models.bitpacking import packed_modules

# A model folder is untrusted input that names classes: only these packages are ever imported
# because of it, so a folder cannot run code of its own choice.
TRUSTED_PACKAGES = ("bench.", "methods.")


class ReplacedModule(nn.Module, ABC):
    """Module that describes how it is built, and can be rebuilt to receive its weights."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """Return the JSON values that `from_spec` needs."""

    def routed(self) -> tuple[int, int] | None:
        """Return the number of parameters that belong to single experts, and the number of experts.

        Only for experts in a form that the structure does not describe; None for all other modules.
        """
        return None

    @classmethod
    @abstractmethod
    def empty(cls, structure: dict[str, Any], original: nn.Module) -> Self:
        """Build the module with weights of the right shapes and arbitrary values.

        `original` is the published module that is replaced; what JSON cannot hold, such as an
        activation, is taken from it.
        """


def replaced_modules(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return class and spec of every replaced module, by its name in the network."""
    return {
        # The path is part of the folder format: moving a class breaks folders written before.
        name: {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
        | module.structure()
        for name, module in network.named_modules()
        if isinstance(module, ReplacedModule)
    }


def install_replaced_modules(network: nn.Module, structures: dict[str, dict[str, Any]]) -> None:
    """Install replaced modules, still without their weights, in a published network.

    Raises:
        UserError: a name or a class is unknown, or the values do not match the class.
    """
    for name, structure in structures.items():
        # Outer modules come before inner ones (`named_modules` is depth-first), so a replaced
        # module inside another one finds its parent already installed.
        parent_name, _, child = name.rpartition(".")
        try:
            parent = network.get_submodule(parent_name)
            original = parent.get_submodule(child)
            built = _replaced_class(structure).empty(structure, original)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"slimbench.json: {name} cannot be built: {error}") from None
        setattr(parent, child, built)


def _replaced_class(structure: dict[str, Any]) -> type[ReplacedModule]:
    """Import the class that a description names, if it is a replaced module of ours."""
    path = str(structure["class"])
    module, _, name = path.rpartition(".")
    if not path.startswith(TRUSTED_PACKAGES):
        raise ValueError(f"{path} is not a module of slimbench")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"{path} does not exist in this version") from None
    # Importing from our packages is not enough: they also hold functions and classes with effects.
    if not (isinstance(found, type) and issubclass(found, ReplacedModule)):
        raise ValueError(f"{path} is not a module that can be built again")
    return found


DESCRIPTION_FILE = "slimbench.json"

# Increase it when an older program would read a folder incorrectly.
DESCRIPTION_FORMAT = 1
Description = dict[str, Any]


def describe_network(network: nn.Module) -> Description | None:
    """Describe a network's replaced and packed modules; None if it has none."""
    codes = packed_modules.describe_packed(network)
    modules = replaced_modules(network)
    if not modules and not codes["linears"] and not codes["experts"]:
        return None
    return {"format": DESCRIPTION_FORMAT, "modules": modules, "packed": codes}


def write_description(description: Description, folder: Path) -> None:
    """Write a description into a model folder."""
    (folder / DESCRIPTION_FILE).write_text(
        json.dumps(description, indent=1) + "\n", encoding="utf-8"
    )


def read_description(folder: Path) -> Description | None:
    """Read the description in a model folder; None for an ordinary folder.

    Raises:
        UserError: it cannot be read, or was written by a different version of the format.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is corrupt: it does not describe a network") from None
    if version != DESCRIPTION_FORMAT:
        raise UserError(f"{file} has format {version}, this program reads {DESCRIPTION_FORMAT}")
    return dict(description)


def install_described_modules(network: nn.Module, description: Description) -> None:
    """Install empty modules as described in a network of the published shape."""
    # Replaced modules first: packed linear layers may be inside them.
    install_replaced_modules(network, description["modules"])
    packed_modules.install_packed(network, description["packed"])


def described_class(base: type[nn.Module], description: Description) -> type[nn.Module]:
    """Return a network class whose constructor builds the described network."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        install_described_modules(self, description)

    # A subclass under the name and module of its base, so that all of transformers' loading works
    # on it: shards, placement on devices, tied weights, non-persistent buffers. Modules installed
    # after `from_pretrained` would miss these steps.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
