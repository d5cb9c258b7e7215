"""What a folder says about a network that is no longer of its published shape.

`slimbench.json` beside the weights names every module that stands in the place of a published one
and how it is built; the weights themselves lie in safetensors under the names that the modules
give them. A folder without that file is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bench.errors import UserError
from bench.models import own, packed

FILE = "slimbench.json"
FORMAT = 1

Description = dict[str, Any]


def describe(network: nn.Module) -> Description | None:
    """Return how to build a network's modules of our own; None when it has none."""
    codes = packed.describe(network)
    modules = own.structures(network)
    if not modules and not codes["linears"] and not codes["experts"]:
        return None
    return {"format": FORMAT, "modules": modules, "packed": codes}


def write(description: Description, folder: Path) -> None:
    """Write a description into a model folder."""
    (folder / FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Description | None:
    """Return the description in a model folder; None for an ordinary folder.

    Raises:
        UserError: it cannot be read, or a later version wrote it.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is corrupt: it is not a description of a network") from None
    if version != FORMAT:
        raise UserError(f"{file} has format {version}, this program reads {FORMAT}")
    return dict(description)


def rebuild(network: nn.Module, description: Description) -> None:
    """Put empty modules as described in their places of a network of the published shape."""
    own.restructure(network, description["modules"])
    packed.install(network, description["packed"])


def described_class(base: type[nn.Module], description: Description) -> type[nn.Module]:
    """Return a network class whose constructor builds the described network.

    It goes by the name of its base, so that all of transformers' loading works on it: shards,
    placement on devices, tied weights, buffers that are not stored.
    """

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        rebuild(self, description)

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
