"""What a training leaves so that it can go on after a kill: safetensors and JSON, no pickle.

A checkpoint is a folder that appears whole or not at all, by a rename. The run that goes on from
it ends in the same weights as one that was never stopped. One that is damaged or of another
program is set aside, with a word, and the training begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.progress import SILENT, Progress

FORMAT = 1
SECONDS = 60.0
"""How much work a kill may cost, unless writing takes so long that it must be rarer."""
SHARE = 0.05
"""The most of the time that goes into writing."""

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a run by name, and all else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `name/`, without that."""
        start = f"{name}/"
        found = {k: t for k, t in self.tensors.items() if k.startswith(start)}
        return {key.removeprefix(start): tensor for key, tensor in found.items()}


class Keeper:
    """The checkpoints of one training; without a folder there are none."""

    def __init__(self, folder: Path | None, progress: Progress = SILENT) -> None:
        self._folder = folder
        self._progress = progress
        self._due = time.monotonic() + SECONDS

    def last(self) -> Checkpoint | None:
        """Return where a killed training was, None when there was none."""
        found = read(self._folder, self._progress.warn) if self._folder else None
        if found is not None:
            self._progress.say(f"going on with the training from its step {found.step}")
        return found

    def keep(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint; a disk that takes none costs a word and not the training."""
        if self._folder is None:
            return
        began = time.monotonic()
        try:
            write(self._folder, make())
        except (OSError, SafetensorError) as error:
            self._progress.warn(f"no checkpoint could be written to {self._folder}: {error}")
        took = time.monotonic() - began
        self._due = time.monotonic() + max(SECONDS, took / SHARE)

    def keep_if_due(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint if the last one is old."""
        if time.monotonic() >= self._due:
            self.keep(make)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into its own sub-folder and remove the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:09d}"
    temporary = folder / f"{final.name}.tmp{os.getpid()}"
    temporary.mkdir()
    try:
        _fill(temporary, checkpoint)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for older in folder.glob("step-*"):
        if older != final:
            shutil.rmtree(older)


def read(folder: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """Return the latest checkpoint of a folder, None when there is none that can be read."""
    complete = sorted(path for path in folder.glob("step-*") if ".tmp" not in path.name)
    for path in reversed(complete):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            names = (folder / f"aside{n}-{path.name}" for n in count(1))
            free = next(name for name in names if not name.exists())
            path.rename(free)
            if warn is not None:
                warn(f"checkpoint {path} cannot be read ({error}): it is set aside as {free.name}")
    return None


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / _TENSORS)
    text = json.dumps({"step": checkpoint.step, **checkpoint.state})
    sums = {"tensors": _digest(folder / _TENSORS), "text": _of(text)}
    about = json.dumps({"format": FORMAT, "sums": sums, "text": text})
    (folder / _STATE).write_text(about, encoding="utf-8")
    for name in (_TENSORS, _STATE):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint; a `ValueError` says why that is not possible."""
    about = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"its format is {found}, this program reads {FORMAT}")
    sums = {"tensors": _digest(folder / _TENSORS), "text": _of(about["text"])}
    if about["sums"] != sums:
        raise ValueError("it is not what was written: its checksum does not match")
    state = json.loads(about["text"])
    return Checkpoint(state.pop("step"), load_file(folder / _TENSORS), state)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


def named(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of several parts under `part/name`."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
