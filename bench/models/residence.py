"""Weights that live in CPU memory or on disk, brought to the device for as long as they change.

accelerate keeps a model larger than its device in pieces: a hook on every module fetches the
module's weights before its forward and drops them after it. That is how such a model runs, but a
method that changes a layer needs the weights to stay, and the changed ones to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of a module is fetched from elsewhere when it is needed."""
    return any(True for _ in _offloaded(module))


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on, wherever its weights wait."""
    for _, _, hook in _offloaded(module):
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Hold all weights of a module on its device inside the block; keep what was changed.

    Inside, the module runs and can be changed like any other, submodules may be replaced. At the
    end changed and new weights go back to where the module's weights were: to CPU memory, or to
    safetensors files on disk. A module that is not offloaded is left alone.
    """
    stays = _Stay(module)
    try:
        yield
    finally:
        stays.end()


@contextmanager
def without_hooks(network: nn.Module) -> Iterator[None]:
    """Let modules run as they are defined, fetching nothing; for counting on the meta device."""
    hooked = [m for m in network.modules() if "_hf_hook" in m.__dict__]
    before = [module.__dict__.pop("forward") for module in hooked]
    try:
        yield
    finally:
        for module, forward in zip(hooked, before, strict=True):
            module.__dict__["forward"] = forward


def fetched(network: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter of a network once, offloaded ones fetched one after the other."""
    seen: set[nn.Parameter] = set()
    for module in network.modules():
        hook = _fetching(module)
        for name, weight in module.named_parameters(recurse=False):
            if weight not in seen:
                yield hook.weights_map[name] if hook and weight.is_meta else weight
            seen.add(weight)


def _offloaded(module: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield the submodules whose weights are fetched, with name and hook."""
    for name, part in module.named_modules():
        hook = _fetching(part)
        if hook is not None:
            yield name, part, hook


def _fetching(module: nn.Module) -> Any:
    """Return accelerate's hook that fetches a module's own weights, alone or in a sequence."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((single for single in hooks if getattr(single, "offload", False)), None)


@dataclass
class _Store:
    """Where a module's weights are kept: accelerate's map, and the module's own name in it."""

    weights: Any
    prefix: str
    device: torch.device
    folder: Path | None
    loaded: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def keep(self, name: str, weight: Tensor) -> None:
        """Write one weight, unless it is what was read."""
        known = self.loaded.get(name)
        if known is not None and known[0] is weight and known[1] == weight._version:
            return
        key = f"{self.prefix}{name}"
        if key not in self.weights.all_keys:
            self.weights.all_keys.append(key)
        if self.folder is None:
            self.weights.state_dict[key] = weight.detach().cpu()
        else:
            self.weights.index[key] = _write(self.folder, key, weight.detach())

    def forget(self, name: str) -> None:
        """Remove a weight that the module no longer has."""
        key = f"{self.prefix}{name}"
        self.weights.state_dict.pop(key, None)
        self.weights.all_keys.remove(key)
        file = Path(self.weights.index.pop(key, {}).get("safetensors_file", ""))
        # The model's own folder is only read; what was written beside it for this model can go.
        if file.parent == self.folder:
            file.unlink(missing_ok=True)


class _Stay:
    """One stay of a module's weights on its device."""

    def __init__(self, module: nn.Module) -> None:
        from accelerate.hooks import remove_hook_from_module

        self._module = module
        self._store: _Store | None = None
        for name, part, hook in list(_offloaded(module)):
            store = self._store = self._store or _store(name, hook)
            remove_hook_from_module(part)
            for own, weight in list(part.named_parameters(recurse=False)):
                path = f"{name}.{own}" if name else own
                # On a CPU a tensor is a map of its file, which may be replaced while it is in use.
                mapped = store.device.type == "cpu"
                value = store.weights[store.prefix + path].to(store.device, copy=mapped)
                held = nn.Parameter(value, requires_grad=weight.requires_grad)
                part.register_parameter(own, held)
                store.loaded[path] = (held, held._version)

    def end(self) -> None:
        """Write back what changed and leave the weights to accelerate again."""
        if self._store is None:
            return
        present = dict(self._module.named_parameters())
        for name, weight in present.items():
            self._store.keep(name, weight)
        for name in self._store.loaded.keys() - present.keys():
            self._store.forget(name)
        for name, part in self._module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                _offload(part, name, self._store)


def _store(name: str, hook: Any) -> _Store:
    """Return where the weights are kept, from the hook of the submodule called `name`."""
    weights = hook.weights_map.dataset
    own = f"{name}." if name else ""
    prefix = hook.weights_map.prefix.removesuffix(own)
    on_disk = any(key.startswith(prefix) for key in weights.index)
    folder = Path(weights.save_folder) if on_disk else None
    return _Store(weights, prefix, torch.device(hook.execution_device), folder)


def _offload(part: nn.Module, name: str, store: _Store) -> None:
    """Let accelerate fetch a submodule's weights from the store when it runs."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import PrefixedDataset

    own = f"{name}." if name else ""
    hook = AlignDevicesHook(
        execution_device=store.device,
        offload=True,
        weights_map=PrefixedDataset(store.weights, store.prefix + own),
    )
    add_hook_to_module(part, hook)


def _write(folder: Path, key: str, weight: Tensor) -> dict[str, str]:
    """Write one weight to a file of its own and say where it is, as accelerate's index does."""
    from safetensors.torch import save_file

    file = folder / f"{key}.safetensors"
    partial = file.with_suffix(".partial")
    save_file({key: weight.contiguous()}, partial)
    partial.replace(file)
    kind = str(weight.dtype).removeprefix("torch.")
    return {"safetensors_file": str(file), "weight_name": key, "dtype": kind}
