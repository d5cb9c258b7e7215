"""Modules of slimbench's own that stand in a published network where another module stood.

A method that changes the shape or the form of weights replaces a module by an `OwnModule`. What
it needs to be built again without its weights is a few JSON values, its `structure`, so that such
a network can be written to a folder and loaded from it like any other.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import nn

from bench.errors import UserError

# Only code of these packages is ever imported because a model's folder names it.
PACKAGES = ("bench.", "methods.")


class OwnModule(nn.Module, ABC):
    """A module that can say how it is built, and be built again to receive its weights."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """Return the JSON values that `empty` needs."""

    def routed(self) -> tuple[int, int] | None:
        """Return how many parameters belong to single experts, and how many experts there are.

        Only for experts in a form that the anatomy does not know; None for all other modules.
        """
        return None

    @classmethod
    @abstractmethod
    def empty(cls, structure: dict[str, Any], original: nn.Module) -> Self:
        """Build the module with weights of the right shapes and any value.

        `original` is the published module in whose place it comes; what cannot be written as
        JSON, such as an activation, is taken from it.
        """


def structures(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, by its place in the network, how each of our modules is built."""
    return {
        name: {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
        | module.structure()
        for name, module in network.named_modules()
        if isinstance(module, OwnModule)
    }


def restructure(network: nn.Module, structures: dict[str, dict[str, Any]]) -> None:
    """Put our modules, still without their weights, in their places of a published network.

    Raises:
        UserError: a place or a class is unknown, or the values do not fit the class.
    """
    for name, structure in structures.items():
        parent_name, _, child = name.rpartition(".")
        try:
            parent = network.get_submodule(parent_name)
            original = parent.get_submodule(child)
            built = _class(structure).empty(structure, original)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"the structure of {name} cannot be built: {error}") from None
        setattr(parent, child, built)


def _class(structure: dict[str, Any]) -> type[OwnModule]:
    """Return the class that a structure names, if it is one of ours."""
    path = str(structure["class"])
    module, _, name = path.rpartition(".")
    if not path.startswith(PACKAGES):
        raise ValueError(f"{path} is not a module of slimbench")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"{path} does not exist in this version") from None
    if not (isinstance(found, type) and issubclass(found, OwnModule)):
        raise ValueError(f"{path} is not a module that can be built again")
    return found
