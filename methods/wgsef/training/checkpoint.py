"""What a training run leaves so that it can go on after a kill: safetensors and JSON, no pickle.

A checkpoint is a folder that appears whole or not at all, by a rename. The run that goes on from
it ends in the same weights as one that was never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a run by name, and all else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into its own sub-folder and remove the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:09d}"
    temporary = folder / f"{final.name}.tmp{os.getpid()}"
    temporary.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, temporary / _TENSORS)
    state = json.dumps({"step": checkpoint.step, **checkpoint.state})
    (temporary / _STATE).write_text(state, encoding="utf-8")
    for name in (_TENSORS, _STATE):
        with (temporary / name).open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for older in folder.glob("step-*"):
        if older != final:
            shutil.rmtree(older)


def read(folder: Path) -> Checkpoint | None:
    """Return the latest checkpoint of a folder, None when there is none."""
    complete = sorted(path for path in folder.glob("step-*") if ".tmp" not in path.name)
    if not complete:
        return None
    state = json.loads((complete[-1] / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(state.pop("step"), load_file(complete[-1] / _TENSORS), state)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter index and name; it holds tensors only."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` of another returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
