"""Device map of a model that is larger than its device.

`offload_cpu` and `offload_disk` keep every decoder layer in CPU memory or on disk and everything
else on the device; other maps are accelerate's own. The folder for weights on disk lives as long as
the network.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.models.anatomy import dissect

OFFLOADS = {"offload_cpu": "cpu", "offload_disk": "disk"}

DeviceMap = str | dict[str, Any]


def device_map(
    wanted: str | None, device: torch.device, skeleton: Callable[[], nn.Module]
) -> DeviceMap | None:
    """Return the device map for `from_pretrained`; None loads the model into CPU memory.

    `skeleton` returns the network on the meta device, in which the parts are looked up.
    """
    if wanted in OFFLOADS:
        return _layers_elsewhere(skeleton(), device, OFFLOADS[wanted])
    # On a GPU the files are read there directly, so that the host never holds the whole model.
    return wanted or ({"": device} if device.type == "cuda" else None)


def _layers_elsewhere(skeleton: nn.Module, device: torch.device, place: str) -> dict[str, Any]:
    """Map decoder layers to `place`, and every other part with a tensor to the device."""
    layers = set(dissect(skeleton).layers)
    found: dict[str, Any] = {}

    def visit(module: nn.Module, name: str) -> None:
        # The map must cover every tensor. An entry covers a module with all its children, so a
        # layer and a part with tensors of its own are entered whole, and only containers are
        # descended into.
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if module in layers:
            found[name] = place
        elif own:
            found[name] = str(device)
        else:
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(skeleton, "")
    return found


def offload_folder() -> str:
    """Create a folder for weights on disk."""
    return tempfile.mkdtemp(prefix="slimbench-weights-")


def remove_with(network: nn.Module, folder: str) -> None:
    """Remove a folder once the network is garbage-collected."""
    # Not `atexit`: a sweep loads many models in one process, each with its weights on disk.
    weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)
