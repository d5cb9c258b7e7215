"""Onloading of weights in CPU memory or on disk for changes, and device maps of large models.

For a model larger than its device, accelerate puts a hook on every module, which loads the module's
weights before its forward and drops them afterwards. To change a layer, a method needs the weights
to stay on the device and the changed weights to be stored.

The device maps `offload_cpu` and `offload_disk` store every decoder layer in CPU memory or on disk
and everything else on the device; other maps are accelerate's own. The folder for weights on disk
is removed together with the network.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.models.network import replaced_forward
from bench.models.structure.model_structure import inspect_model


class _OffloadedWeights(Protocol):
    """accelerate's store of all offloaded weights, by their full names in the model."""

    state_dict: dict[str, Tensor]
    index: dict[str, dict[str, str]]
    all_keys: list[str]
    save_folder: str

    def __getitem__(self, key: str) -> Tensor: ...


class _WeightsMap(Protocol):
    """Part of the store for one module, by the weights' own names."""

    dataset: _OffloadedWeights
    prefix: str

    def __getitem__(self, key: str) -> Tensor: ...


class _OffloadHook(Protocol):
    """accelerate's hook that loads a module's weights before its forward."""

    execution_device: torch.device | str | int
    weights_map: _WeightsMap


def is_offloaded(module: nn.Module) -> bool:
    """Return whether any weight of a module is loaded from CPU memory or disk when needed."""
    return any(True for _ in _offloaded_submodules(module))


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, which may not be that of its weights."""
    for _, _, hook in _offloaded_submodules(module):
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Keep all weights of a module on its device inside the block, and store changes afterwards.

    Inside the block the module can be run and changed like any other, and submodules may be
    replaced. At the end, changed and new weights are written to where the module's weights are:
    CPU memory, or safetensors files on disk. Nothing happens if the module is not offloaded.
    """
    weights = _Onloaded(module)
    try:
        yield
    finally:
        weights.end()


@contextmanager
def without_offload_hooks(network: nn.Module) -> Iterator[None]:
    """Run modules without accelerate's hooks, for counting on the meta device."""
    # accelerate wraps `forward` on the instance. On meta no weights are needed, but the hooks would
    # read whole layers from disk.
    with ExitStack() as stack:
        for module in network.modules():
            if "_hf_hook" in module.__dict__:
                stack.enter_context(replaced_forward(module, None))
        yield


def iter_parameters(network: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter of a network once, loading offloaded ones one at a time."""
    seen: set[nn.Parameter] = set()
    for module in network.modules():
        hook = _offload_hook(module)
        for name, weight in module.named_parameters(recurse=False):
            if weight not in seen:
                # Offloaded parameters are meta tensors in the module. Tied ones are the same object
                # and are yielded once.
                yield hook.weights_map[name] if hook and weight.is_meta else weight
            seen.add(weight)


def _offloaded_submodules(module: nn.Module) -> Iterator[tuple[str, nn.Module, _OffloadHook]]:
    """Yield name, submodule and hook of all submodules whose weights are offloaded."""
    for name, part in module.named_modules():
        hook = _offload_hook(part)
        if hook is not None:
            yield name, part, hook


def _offload_hook(module: nn.Module) -> _OffloadHook | None:
    """Return accelerate's hook that loads a module's own weights, alone or in a sequence."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((single for single in hooks if getattr(single, "offload", False)), None)


@dataclass
class _WeightStore:
    """Storage of a module's weights: accelerate's map, and the module's prefix in it."""

    weights: _OffloadedWeights
    prefix: str
    device: torch.device
    folder: Path | None
    loaded: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def keep(self, name: str, weight: Tensor) -> None:
        """Store one weight, unless it is unchanged."""
        known = self.loaded.get(name)
        # A weight is unchanged if both its identity and its `_version` are: a new parameter may
        # have the same version, and an in-place write increases it. Without this test, reading a
        # model on disk would write a full copy of it.
        if known is not None and known[0] is weight and known[1] == weight._version:
            return
        key = f"{self.prefix}{name}"
        if key not in self.weights.all_keys:
            self.weights.all_keys.append(key)
        if self.folder is None:
            self.weights.state_dict[key] = weight.detach().cpu()
        else:
            self.weights.index[key] = _write_weight(self.folder, key, weight.detach())

    def forget(self, name: str) -> None:
        """Remove a weight that the module no longer has."""
        key = f"{self.prefix}{name}"
        self.weights.state_dict.pop(key, None)
        self.weights.all_keys.remove(key)
        file = Path(self.weights.index.pop(key, {}).get("safetensors_file", ""))
        # Files in the model's own folder are never deleted, only those written for this network.
        if file.parent == self.folder:
            file.unlink(missing_ok=True)


class _Onloaded:
    """Weights of one module while they are on its device."""

    def __init__(self, module: nn.Module) -> None:
        from accelerate.hooks import remove_hook_from_module

        self._module = module
        self._store: _WeightStore | None = None
        # All submodules of a layer share one accelerate dataset, so any hook leads to the store.
        for name, part, hook in list(_offloaded_submodules(module)):
            store = self._store = self._store or _weight_store(name, hook)
            remove_hook_from_module(part)
            for own, weight in list(part.named_parameters(recurse=False)):
                path = f"{name}.{own}" if name else own
                # On a CPU a tensor is a memory map of its file, which `keep` may replace, so it is
                # copied. On a GPU the transfer makes a copy.
                mapped = store.device.type == "cpu"
                value = store.weights[store.prefix + path].to(store.device, copy=mapped)
                parameter = nn.Parameter(value, requires_grad=weight.requires_grad)
                part.register_parameter(own, parameter)
                store.loaded[path] = (parameter, parameter._version)

    def end(self) -> None:
        """Store what changed and offload the weights again."""
        if self._store is None:
            return
        # Parameters may have changed their names: replaced experts add and remove some.
        present = dict(self._module.named_parameters())
        for name, weight in present.items():
            self._store.keep(name, weight)
        for name in self._store.loaded.keys() - present.keys():
            self._store.forget(name)
        for name, part in self._module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                _attach_offload_hook(part, name, self._store)


def _weight_store(name: str, hook: _OffloadHook) -> _WeightStore:
    """Return the store of a module, derived from the hook of its submodule `name`."""
    weights = hook.weights_map.dataset
    own = f"{name}." if name else ""
    # Keys of the dataset are full names in the model. A hook's prefix ends with the submodule's
    # name; the rest is the prefix of the module itself.
    prefix = hook.weights_map.prefix.removesuffix(own)
    on_disk = any(key.startswith(prefix) for key in weights.index)
    folder = Path(weights.save_folder) if on_disk else None
    return _WeightStore(weights, prefix, torch.device(hook.execution_device), folder)


def _attach_offload_hook(part: nn.Module, name: str, store: _WeightStore) -> None:
    """Attach accelerate's hook that loads a submodule's weights from the store."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import PrefixedDataset

    own = f"{name}." if name else ""
    hook = AlignDevicesHook(
        execution_device=store.device,
        offload=True,
        weights_map=PrefixedDataset(store.weights, store.prefix + own),
    )
    add_hook_to_module(part, hook)


def _write_weight(folder: Path, key: str, weight: Tensor) -> dict[str, str]:
    """Write one weight to its own file and return its entry in accelerate's index."""
    from safetensors.torch import save_file

    file = folder / f"{key}.safetensors"
    # Written under another name and renamed, because tensors may still map the old file, and an
    # interrupted write must not leave an incomplete file.
    partial = file.with_suffix(".partial")
    save_file({key: weight.contiguous()}, partial)
    partial.replace(file)
    kind = str(weight.dtype).removeprefix("torch.")
    return {"safetensors_file": str(file), "weight_name": key, "dtype": kind}


OFFLOAD_TARGETS = {"offload_cpu": "cpu", "offload_disk": "disk"}
PlaceOfModule = dict[str, str | torch.device]
DeviceMap = str | PlaceOfModule


def device_map(
    requested: str | None, device: torch.device, skeleton: Callable[[], nn.Module]
) -> DeviceMap | None:
    """Return the device map for `from_pretrained`; None loads the model into CPU memory.

    `skeleton` returns the network on the meta device, from which the map is derived.
    """
    if requested in OFFLOAD_TARGETS:
        return _offloaded_layers_map(skeleton(), device, OFFLOAD_TARGETS[requested])
    # On a GPU, files are read directly into its memory, so the host never holds the whole model.
    return requested or ({"": device} if device.type == "cuda" else None)


def _offloaded_layers_map(skeleton: nn.Module, device: torch.device, place: str) -> PlaceOfModule:
    """Map decoder layers to `place`, and every other part with a tensor to the device."""
    layers = set(inspect_model(skeleton).layers)
    found: PlaceOfModule = {}

    def visit(module: nn.Module, name: str) -> None:
        # The map must cover every tensor, and an entry covers a module with all its children. So a
        # layer, or a module with tensors of its own, gets one entry, and containers are searched.
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


def remove_folder_with(network: nn.Module, folder: str) -> None:
    """Remove a folder once the network is garbage-collected."""
    # Not `atexit`: a sweep loads many models in one process, each with its weights on disk.
    weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)
