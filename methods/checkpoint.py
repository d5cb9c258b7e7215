"""Training checkpoints: safetensors and JSON, no pickle.

A checkpoint is a folder that is written elsewhere and renamed into place, so it exists completely
or not at all. A training that resumes from one ends in the same weights as an uninterrupted run. A
damaged or incompatible checkpoint is moved aside with a warning; the next older one is tried, and
without any the training starts from scratch.
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

from bench.ui import SILENT, Progress

CHECKPOINT_FORMAT = 1
MIN_INTERVAL_SECONDS = 60.0
"""Minimum time between checkpoints: the work that a kill may cost, unless writing is slow."""
MAX_WRITE_SHARE = 0.05
"""Maximum fraction of the time spent writing checkpoints."""
_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """State of a training at one step: named tensors, and JSON values for everything else."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Return the tensors named `name/...`, with that prefix stripped."""
        prefix = f"{name}/"
        found = {k: t for k, t in self.tensors.items() if k.startswith(prefix)}
        return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


class CheckpointManager:
    """Reads and writes the checkpoints of one training.

    Without a folder nothing is read or written.
    """

    def __init__(self, folder: Path | None, progress: Progress = SILENT) -> None:
        self._folder = folder
        self._progress = progress
        self._due = time.monotonic() + MIN_INTERVAL_SECONDS

    def latest(self) -> Checkpoint | None:
        """Return the latest readable checkpoint, or None."""
        found = read_checkpoint(self._folder, self._progress.warn) if self._folder else None
        if found is not None:
            self._progress.say(f"resuming training from step {found.step}")
        return found

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint. A failed write is logged as a warning; training continues."""
        if self._folder is None:
            return
        start = time.monotonic()
        try:
            write_checkpoint(self._folder, make())
        except (OSError, SafetensorError) as error:
            self._progress.warn(f"could not write a checkpoint to {self._folder}: {error}")
        seconds = time.monotonic() - start
        # Waiting seconds / SHARE after a write bounds the share of time spent writing, however slow
        # the disk or large the model.
        self._due = time.monotonic() + max(MIN_INTERVAL_SECONDS, seconds / MAX_WRITE_SHARE)

    def save_if_due(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint if the last one is old enough."""
        if time.monotonic() >= self._due:
            self.save(make)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a subfolder of `folder`, then delete the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:09d}"
    temporary = folder / f"{final.name}.tmp{os.getpid()}"
    replaced = folder / f"{final.name}.old{os.getpid()}"
    # Left over by a killed writer with the same process number, which in containers is common.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, checkpoint)
    # BaseException: Ctrl-C and SystemExit must not leave a partial folder behind either.
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # The same step is written twice if a due checkpoint is followed by the final one. rename() does
    # not replace a non-empty folder, so the old one is renamed aside and deleted only when the new
    # one is in place: whenever a kill comes, one of the two can be read.
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    # The names themselves must survive a power failure before anything older is deleted.
    _flush(folder)
    # Only now, after the rename: until then the older checkpoint is what a killed run resumes from.
    # The pattern also matches `.tmp<pid>` and `.old<pid>` folders, also those of killed writers.
    for older in folder.glob("step-*"):
        if older != final:
            shutil.rmtree(older)


def read_checkpoint(folder: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """Return the latest readable checkpoint of a folder, or None.

    Unreadable ones are renamed to `aside<n>-<name>` and reported through `warn`.
    """
    # `.tmp` marks a folder whose writer was killed before the rename. `.old` is complete: it stands
    # in for its step if the writer was killed between its two renames.
    complete = [path for path in folder.glob("step-*") if ".tmp" not in path.name]
    complete.sort(key=lambda path: (path.name.partition(".")[0], ".old" not in path.name))
    for path in reversed(complete):
        try:
            return _read_folder(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            # Moved aside, not deleted: hours of training may be recoverable by hand. The counter
            # avoids overwriting an earlier one.
            names = (folder / f"aside{n}-{path.name}" for n in count(1))
            free = next(name for name in names if not name.exists())
            path.rename(free)
            if warn is not None:
                warn(f"cannot read checkpoint {path} ({error}): moved aside to {free.name}")
    return None


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / _TENSORS)
    # The state is embedded as a string, not as an object, so that the checksum covers exact bytes
    # and does not depend on how JSON is serialized again on reading.
    text = json.dumps({"step": checkpoint.step, **checkpoint.state})
    sums = {"tensors": _file_digest(folder / _TENSORS), "text": _text_digest(text)}
    about = json.dumps({"format": CHECKPOINT_FORMAT, "sums": sums, "text": text})
    (folder / _STATE).write_text(about, encoding="utf-8")
    # Flush before the rename: otherwise a power failure can leave a folder with its final name and
    # empty files.
    for name in (_TENSORS, _STATE):
        _flush(folder / name)


def _flush(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power failure."""
    # With a descriptor, because a folder cannot be opened as a Python file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_folder(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        ValueError: the format is unknown, or the content is not what was written.
    """
    about = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("format") != CHECKPOINT_FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ValueError(f"its format is {found}, expected {CHECKPOINT_FORMAT}")
    text = about["text"]
    if not isinstance(text, str):
        raise ValueError(f"corrupt: its state is {type(text).__name__}, expected text")
    sums = {"tensors": _file_digest(folder / _TENSORS), "text": _text_digest(text)}
    if about["sums"] != sums:
        raise ValueError("corrupt: its checksum does not match")
    state = json.loads(text)
    return Checkpoint(state.pop("step"), load_file(folder / _TENSORS), state)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer state as tensors named `<parameter index>.<state name>`.

    Hyperparameters (`param_groups`) are not included.
    """
    state = optimizer.state_dict()["state"]
    return {
        # Some optimizers keep Python numbers (a step count) and None (SGD's momentum buffer without
        # momentum); the first become tensors, the second are left out.
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore a state returned by `optimizer_tensors`.

    The optimizer keeps its own hyperparameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def prefixed_tensors(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge several groups of tensors into one dict with keys `group/name`."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
