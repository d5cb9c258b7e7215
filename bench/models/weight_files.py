"""Location and integrity of a model's weight files; no weight is read.

Only safetensors are accepted: a pickled file can run code when it is opened. The format: eight
bytes little-endian with the header's length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

# The reference implementation's limit; it stops a corrupt length from allocating the memory.
MAX_HEADER_BYTES = 100_000_000


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder, sorted by name, after checking them.

    Raises:
        UserError: there are none, only pickled ones, one that is missing, truncated or corrupt, or
            one that lies outside the folder.
    """
    refuse_outside_links(folder)
    if (folder / INDEX_FILE).is_file():
        files = _indexed_shards(folder)
    elif (folder / SINGLE_FILE).is_file():
        files = (folder / SINGLE_FILE,)
    else:
        raise UserError(_no_weights_message(folder))
    for file in files:
        check_header(file)
    return files


def refuse_outside_links(folder: Path) -> None:
    """Raise if a file of the folder, at any depth, is a link to a file outside it.

    A snapshot in the Hugging Face cache consists of links to `blobs` next to it; those stay within
    the model's own part of the cache and are allowed.
    """
    # A downloaded folder is untrusted: a link to ~/.ssh would otherwise be read as a tokenizer
    # file, and its content could end up in an error message.
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for file in sorted(folder.rglob("*")):
        if not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist")
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} leads out of its model folder to {file.resolve()}, which is not allowed"
            )


def check_header(file: Path) -> None:
    """Raise if a safetensors file is truncated or its header does not match its content."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file} is cut off or not a safetensors file: it has {size} bytes")
        try:
            header = json.loads(stream.read(length))
            spans = sorted(
                _byte_range(entry) for name, entry in header.items() if name != "__metadata__"
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is corrupt: its header cannot be read") from None
    end = 0
    for start, stop in spans:
        # Sorted spans that meet end to start cover the data part exactly once; gaps could hide
        # data, and overlaps let two tensors alias.
        if start != end or stop < start:
            raise UserError(f"{file} is corrupt: its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        wanted = 8 + length + end
        raise UserError(f"{file} is cut off: it has {size} bytes, its header describes {wanted}")


def _byte_range(entry: dict[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends in the file's data part."""
    start, stop = entry["data_offsets"]
    if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
        # Caught by the caller, like every malformed entry.
        raise TypeError
    return int(start), int(stop)


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    """Return the shards named by the index."""
    try:
        named = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{folder / INDEX_FILE} is corrupt: it has no readable weight_map"
        ) from None
    for name in names:
        # The index is untrusted input, too: `../x.safetensors` would leave the folder without a
        # link.
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{folder / INDEX_FILE} names {name!r}, which is outside its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {missing[0]}")
    if any(not name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder / INDEX_FILE} names files that are not safetensors")
    return tuple(folder / name for name in names)


def _no_weights_message(folder: Path) -> str:
    """Describe what the folder has instead of safetensors."""
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened: "
            "convert them to safetensors"
        )
    return f"{folder} has no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}"
