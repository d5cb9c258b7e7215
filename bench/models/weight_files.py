"""Locating and checking a folder's weight files, and comparing the config's sizes with them.

No tensor is built or read here. Only safetensors are accepted, because a pickled file can run code
when opened. The format: eight bytes with the header's length (little-endian), a JSON header, then
the tensors without gaps (https://github.com/huggingface/safetensors, section Format). A folder is
untrusted: its JSON may be nested thousands of levels deep, or state a billion layers, so sizes are
checked by arithmetic before anything is allocated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from bench.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
DESCRIPTION_FILE = "slimbench.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OWN_VARIANT = "slimbench"
"""transformers' name for weights of a variant, which it loads only on request."""
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

# The limit of the reference implementation; without it a corrupt length could exhaust the memory.
MAX_HEADER_BYTES = 100_000_000


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers loads from a folder, after checking them.

    Raises:
        UserError: there are none, or only pickled ones; a file is missing, truncated, corrupt or
            outside the folder; the folder makes transformers read further files; or config.json
            states sizes that do not match the files.
    """
    refuse_outside_links(folder)
    _refuse_further_weights(folder)
    # In the same order as transformers: if the single file exists, an index and its shards are not
    # read. Variants (model.fp16.safetensors) and subfolders are read only on request, which
    # `weights_variant` makes for our own folders.
    single, index = weight_names(weights_variant(folder))
    if (folder / single).is_file():
        files: tuple[Path, ...] = (folder / single,)
    elif (folder / index).is_file():
        files = _indexed_shards(folder / index)
    else:
        raise UserError(_no_weights_message(folder))
    tensors, config = sum(map(check_header, files)), folder / "config.json"
    if config.is_file():
        bits = 8 * sum(file.stat().st_size for file in files)
        _refuse_impossible_sizes(read_json_object(config), str(config), tensors=tensors, bits=bits)
    return files


def weight_names(variant: str | None) -> tuple[str, str]:
    """Return the names of a variant's single weight file and of its index of shards."""
    if variant is None:
        return SINGLE_FILE, INDEX_FILE
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


def weights_variant(folder: Path) -> str | None:
    """Return the variant of weights with which a folder must be loaded; usually None."""
    own = any((folder / name).is_file() for name in weight_names(OWN_VARIANT))
    return OWN_VARIANT if own else None


def _refuse_further_weights(folder: Path) -> None:
    """Raise if a file of the folder makes transformers read other files as weights."""
    # With peft installed, transformers adds an adapter to the weights, even a pickled one.
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder} contains an adapter ({ADAPTER_CONFIG}), which would change the "
            "weights silently: merge it into them, or move it to a separate folder"
        )
    for file in sorted(folder.glob("config*.json")):
        try:
            named = read_json_object(file).get("transformers_weights")
        except UserError:
            if file.name == "config.json":
                raise
            continue  # If transformers reads it at all, it fails as well.
        if named is not None:
            raise UserError(
                f"{file} names its weights by transformers_weights={named}: remove that key, and "
                f"rename them to {SINGLE_FILE}, or to {INDEX_FILE} with its shards"
            )


def refuse_outside_links(folder: Path) -> None:
    """Raise if a file of the folder, at any depth, is a link to a file outside it.

    A snapshot in the Hugging Face cache consists of links to `blobs` next to it; those stay within
    the model's own part of the cache and are allowed.
    """
    # A downloaded folder is untrusted: a link to ~/.ssh would otherwise be read as a tokenizer
    # file, and an error message could reveal its content.
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for file in sorted(folder.rglob("*")):
        if not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist")
        # Reading a pipe or a device may never end.
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is neither a file nor a folder")
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} leads out of its model folder to {file.resolve()}, which is not allowed"
            )


def check_header(file: Path) -> int:
    """Check a safetensors file against its header and return the number of its tensors.

    Raises:
        UserError: the file is truncated, or its header does not match its content.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file} is cut off or not a safetensors file: it has {size} bytes")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted(_byte_range(name, entry) for name, entry in tensors.items())
        except _MalformedEntry as fault:
            raise UserError(f"{file} is corrupt: {fault}") from None
        # RecursionError, because a header can be nested thousands of levels deep.
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{file} is corrupt: its header cannot be read") from None
    end = 0
    for start, stop in spans:
        # Sorted ranges that adjoin cover the data exactly once. Gaps could hide data, and with
        # overlaps two tensors would share data.
        if start != end or stop < start:
            raise UserError(f"{file} is corrupt: its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        wanted = 8 + length + end
        raise UserError(f"{file} is cut off: it has {size} bytes, its header describes {wanted}")
    return len(spans)


def _indexed_shards(index: Path) -> tuple[Path, ...]:
    """Return the shards listed in an index."""
    folder = index.parent
    try:
        named = read_json_object(index)["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is corrupt: it has no readable weight_map") from None
    for name in names:
        # The index is untrusted as well: `../x.safetensors` leaves the folder without a link.
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index} names {name!r}, which is outside its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {missing[0]}")
    if any(not name.endswith(".safetensors") for name in names):
        raise UserError(f"{index} names files that are not safetensors")
    return tuple(folder / name for name in names)


def _no_weights_message(folder: Path) -> str:
    """Return a message about what the folder has instead of safetensors."""
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened: "
            "convert them to safetensors"
        )
    return f"{folder} has no weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}"


_BITS_OF_DTYPE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one element, for every dtype of the format."""


class _MalformedEntry(Exception):
    """An entry of a safetensors header that is invalid for any tensor."""


def _byte_range(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Return the start and end of a tensor in the file's data part, in bytes."""
    start, stop = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    # JSON has booleans, floats and infinity, which Python would accept as numbers below.
    if not all(_is_size(number) for number in (start, stop, *shape)):
        raise _MalformedEntry(f"shape or offsets of {name[:80]!r} are not whole numbers from 0 on")
    if dtype not in _BITS_OF_DTYPE:
        raise _MalformedEntry(f"{name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
    bits = 0 if 0 in shape else _BITS_OF_DTYPE[dtype]
    for number in shape:
        bits *= number
        # Checked here, because the product of a thousand numbers can have a million digits.
        if bits > 8 * (stop - start):
            break
    if bits != 8 * (stop - start):
        raise _MalformedEntry(f"the shape of {name[:80]!r} does not match its size")
    return start, stop


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


MAX_CONFIG_BYTES = 50_000_000
"""Published configs have some thousand bytes; descriptions of packed experts a few million."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a small JSON file of a model folder, which is untrusted.

    Raises:
        UserError: it cannot be read, is too large or too deeply nested, or is not an object.
    """
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file} is corrupt: it has more than {MAX_CONFIG_BYTES} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is corrupt: it is not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is corrupt: it does not contain a JSON object")
    return content


_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_WIDTH_KEYS = (
    "hidden_size", "n_embd", "d_model", "embed_dim", "intermediate_size", "moe_intermediate_size",
    "vocab_size", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
)  # fmt: skip


def _refuse_impossible_sizes(
    config: dict[str, Any], where: str, *, tensors: int, bits: int
) -> None:
    """Raise if a config states sizes that its weights cannot have, before anything is built.

    Every layer has at least one tensor, every unit of width at least one bit, and every expert at
    least one bit per hidden dimension. `tensors` and `bits` are totals over all weight files.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_impossible_sizes(value, f"{where}: {key}", tensors=tensors, bits=bits)
        if value is None or key not in (*_LAYER_KEYS, *_EXPERT_KEYS, *_WIDTH_KEYS):
            continue
        # Dense members of an MoE family have 0 experts.
        least = 0 if key in _EXPERT_KEYS else 1
        if not _is_size(value) or value < least:
            raise UserError(f"{where}: {key}={value} is not a whole number from {least} on")
        hidden = config.get("hidden_size")
        room = tensors if key in _LAYER_KEYS else bits
        if key in _EXPERT_KEYS and _is_size(hidden):
            room //= max(hidden, 1)
        if value > room:
            raise UserError(
                f"{where}: {key}={value} does not fit its weight files, which have {tensors} "
                f"tensors of {bits // 8} bytes in all"
            )
    experts = next((config[key] for key in _EXPERT_KEYS if config.get(key)), None)
    chosen = config.get("num_experts_per_tok")
    possible = _is_size(chosen) and _is_size(experts) and 1 <= chosen <= experts
    if experts is not None and chosen is not None and not possible:
        raise UserError(f"{where}: num_experts_per_tok={chosen} of {experts} experts")
