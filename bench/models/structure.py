"""Description of a network that no longer has its published shape, stored in its folder.

`slimbench.json`, next to the weights, names every module that replaces a published one and how it
is built; the weights are in safetensors under the names of these modules. A folder without that
file is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bench.errors import UserError
from bench.models import own, packed

FILE = "slimbench.json"
# Increase it when an older program would read a folder incorrectly.
FORMAT = 1

Description = dict[str, Any]


def describe(network: nn.Module) -> Description | None:
    """Describe a network's replaced and packed modules; None if it has none."""
    codes = packed.describe(network)
    modules = own.structures(network)
    if not modules and not codes["linears"] and not codes["experts"]:
        return None
    return {"format": FORMAT, "modules": modules, "packed": codes}


def write(description: Description, folder: Path) -> None:
    """Write a description into a model folder."""
    (folder / FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Description | None:
    """Read the description in a model folder; None for an ordinary folder.

    Raises:
        UserError: it cannot be read, or was written by a different version of the format.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is corrupt: it does not describe a network") from None
    if version != FORMAT:
        raise UserError(f"{file} has format {version}, this program reads {FORMAT}")
    return dict(description)


def rebuild(network: nn.Module, description: Description) -> None:
    """Install empty modules as described in a network of the published shape."""
    # Replaced modules first: packed linear layers may be inside them.
    own.restructure(network, description["modules"])
    packed.install(network, description["packed"])


def described_class(base: type[nn.Module], description: Description) -> type[nn.Module]:
    """Return a network class whose constructor builds the described network."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        rebuild(self, description)

    # A subclass under the name and module of its base, so that all of transformers' loading works
    # on it: shards, placement on devices, tied weights, non-persistent buffers. Modules installed
    # after `from_pretrained` would miss these steps.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
