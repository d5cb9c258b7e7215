"""Modules of slimbench that replace modules of a published network.

A method that changes the shape or the storage of weights replaces a module by a `ReplacedModule`.
Its `spec`, a few JSON values, suffices to build it again without weights, so that such a network
can be saved to a folder and loaded like any other.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import nn

from bench.errors import UserError

# A model folder is untrusted input that names classes: only these packages are ever imported
# because of it, so a folder cannot run code of its own choice.
PACKAGES = ("bench.", "methods.")


class OwnModule(nn.Module, ABC):
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


def structures(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return class and spec of every replaced module, by its name in the network."""
    return {
        # The path is part of the folder format: moving a class breaks folders written before.
        name: {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
        | module.structure()
        for name, module in network.named_modules()
        if isinstance(module, OwnModule)
    }


def restructure(network: nn.Module, structures: dict[str, dict[str, Any]]) -> None:
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
            built = _class(structure).empty(structure, original)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"slimbench.json: {name} cannot be built: {error}") from None
        setattr(parent, child, built)


def _class(structure: dict[str, Any]) -> type[OwnModule]:
    """Import the class that a description names, if it is a replaced module of ours."""
    path = str(structure["class"])
    module, _, name = path.rpartition(".")
    if not path.startswith(PACKAGES):
        raise ValueError(f"{path} is not a module of slimbench")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"{path} does not exist in this version") from None
    # Importing from our packages is not enough: they also hold functions and classes with effects.
    if not (isinstance(found, type) and issubclass(found, OwnModule)):
        raise ValueError(f"{path} is not a module that can be built again")
    return found
