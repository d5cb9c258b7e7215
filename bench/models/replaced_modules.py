"""Modules of slimbench in a published network, and their description in a saved folder.

A method that changes the shape or the storage of weights replaces a module by a `ReplacedModule`.
Its `spec`, a few JSON values, suffices to rebuild it without weights, so that the network can be
saved to a folder and loaded like any other.

`slimbench.json`, beside the weights, lists every module that replaces a published one and how it is
built; the weights are in safetensors under the names of these modules. A folder without this file
is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypedDict, cast

from torch import nn

from bench import plugins
from bench.errors import UserError, error_sentence
from bench.models.bitpacking import packed_modules
from bench.models.weight_files import DESCRIPTION_FILE, read_json_object

# Increased when an older program would read a folder incorrectly.
DESCRIPTION_FORMAT = 1

# Class names in a folder, and the modules that now define them. A folder states only the name,
# because classes may move. The first folders state a path, such as
# `bench.models.anatomy.ragged.RaggedExperts`, of which only the last part is used. A class of a
# plug-in is stated as `package.module:Class`, and is found only while the user's plug-ins include
# that package. Nothing else is imported for a folder, which is untrusted and must not choose code
# to run.
MODULE_OF_CLASS = {
    "RaggedExperts": "bench.models.structure.ragged_experts",
    "GatedExpert": "bench.models.structure.ragged_experts",
    "NarrowedFeedForward": "bench.models.structure.ragged_experts",
    "SharedBaseExperts": "methods.baselines.d2_moe.shared_base_experts",
    "NoviceExperts": "methods.baselines.mone",
    "SpectralExperts": "methods.quantization.spectral_experts",
    "MaskedRouter": "methods.baselines.router_masks",
}

FORM_OF_CLASS = {
    "RaggedExperts": "ragged",
    "SharedBaseExperts": "shared_base",
    "NoviceExperts": "novices",
    "SpectralExperts": "packed",
}
"""Weight forms, as methods declare them, of replaced modules; a masked router has none."""

# JSON values of one module; `from_spec` validates and converts them.
ModuleSpec = dict[str, Any]


class Description(TypedDict):
    """Contents of `slimbench.json`: replaced modules by name, and packed weights."""

    format: int
    modules: dict[str, ModuleSpec]
    packed: packed_modules.PackedDescription


class ReplacedModule(nn.Module, ABC):
    """Module with a description from which it can be rebuilt to receive its weights."""

    @abstractmethod
    def spec(self) -> ModuleSpec:
        """Return the JSON values that `from_spec` needs."""

    def routed_parameters(self) -> tuple[int, int] | None:
        """Return the number of parameters that belong to single experts, and the number of experts.

        Only for experts in a form that `ModelStructure` does not describe; None for all other
        modules.
        """
        return None

    def padding_parameters(self) -> int:
        """Return the number of parameters that only pad the storage of others."""
        return 0

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build the module with weights of the right shapes and arbitrary values.

        `original` is the published module to replace; it provides what JSON cannot store, such as
        an activation.
        """


def describe_network(network: nn.Module) -> Description | None:
    """Return a description of a network's replaced and packed modules; None if it has none.

    Raises:
        UserError: the class of a replaced module cannot be named in a folder.
    """
    packed = packed_modules.describe_packed(network)
    modules = {
        name: {"class": _class_name(name, module)} | module.spec()
        for name, module in network.named_modules()
        if isinstance(module, ReplacedModule)
    }
    if not modules and not packed["linears"] and not packed["experts"]:
        return None
    return {"format": DESCRIPTION_FORMAT, "modules": modules, "packed": packed}


def weight_forms(network: nn.Module) -> set[str]:
    """Return the weight forms of a network that differ from the published one."""
    packed = next(packed_modules.packed_linears(network), None) is not None
    return _outermost_forms(network) | ({"packed"} if packed else set())


def _outermost_forms(module: nn.Module) -> set[str]:
    """Return the form of a replaced module, or the forms inside any other module."""
    # Experts with constants contain ragged ones, which methods cannot access.
    form = FORM_OF_CLASS.get(type(module).__name__)
    if form is not None:
        return {form}
    return {form for child in module.children() for form in _outermost_forms(child)}


def write_description(description: Description, folder: Path) -> None:
    """Write the description into a model folder."""
    (folder / DESCRIPTION_FILE).write_text(
        json.dumps(description, indent=1) + "\n", encoding="utf-8"
    )


def read_description(folder: Path) -> Description:
    """Read the description from a model folder that has one.

    Raises:
        UserError: it cannot be read, or has a different version of the format.
    """
    file = folder / DESCRIPTION_FILE
    description = read_json_object(file)
    version = description.get("format")
    if version is None:
        raise UserError(f"{file} is corrupt: it does not describe a network")
    if version != DESCRIPTION_FORMAT:
        raise UserError(f"{file} has format {version}, this program reads {DESCRIPTION_FORMAT}")
    for key in ("modules", "packed"):
        if not isinstance(description.get(key), dict):
            raise UserError(f"{file} is corrupt: it has no object {key!r}")
    return cast(Description, description)


def install_described_modules(network: nn.Module, description: Description) -> None:
    """Install described modules in a published network, still without their weights.

    Raises:
        UserError: a name or a class is unknown, or values do not match the class.
    """
    # Replaced modules first, because packed linear layers may be inside them.
    for name, spec in description["modules"].items():
        # `named_modules` is depth-first, so outer modules come first and a module inside a
        # replaced one finds its parent.
        parent_name, _, child = name.rpartition(".")
        try:
            parent = network.get_submodule(parent_name)
            original = parent.get_submodule(child)
            built = _class_by_name(spec).from_spec(spec, original)
        except Exception as error:  # A constructor may raise anything for untrusted values.
            reason = error_sentence(error)
            raise UserError(f"{DESCRIPTION_FILE}: {name} cannot be built: {reason}") from None
        setattr(parent, child, built)
    packed_modules.install_packed(network, description["packed"])


def described_class(base: type[nn.Module], description: Description) -> type[nn.Module]:
    """Return a network class whose constructor builds the described network."""

    def build(self: nn.Module, config: object, *args: object, **kwargs: object) -> None:
        base.__init__(self, config, *args, **kwargs)
        install_described_modules(self, description)

    # A subclass with the name and module of its base, so that all of transformers' loading applies:
    # shards, device placement, tied weights, non-persistent buffers. Modules installed after
    # `from_pretrained` would miss these steps.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _class_name(name: str, module: ReplacedModule) -> str:
    """Return the name by which a folder refers to a module's class."""
    own = type(module)
    if MODULE_OF_CLASS.get(own.__qualname__) == own.__module__:
        return own.__qualname__
    if own.__module__.partition(".")[0] in plugins.active().packages:
        return f"{own.__module__}:{own.__qualname__}"
    # Refused, because the folder could not be loaded.
    raise UserError(
        f"{name} is a {own.__qualname__} of {own.__module__}, which cannot be written to a folder: "
        "declare its package as a plug-in (CONTRIBUTING.md), so that the folder can be loaded again"
    )


def _class_by_name(spec: Mapping[str, object]) -> type[ReplacedModule]:
    stated = str(spec["class"])
    module, colon, name = stated.partition(":")
    if not colon:
        name = stated.rpartition(".")[2]
        module = MODULE_OF_CLASS.get(name, "")
    elif module.partition(".")[0] not in plugins.active().packages:
        raise ValueError(
            f"{stated} is a plug-in's module: install the plug-in, or run where its "
            f"{plugins.PROJECT_FILE} is trusted"
        )
    if not module:
        known = ", ".join(MODULE_OF_CLASS)
        raise ValueError(f"{stated} is not one of the replaced modules {known}")
    found: object = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, ReplacedModule)):
        raise ValueError(f"{stated} is not a ReplacedModule")
    return found
