"""Sizes that a model folder states, checked by arithmetic before anything is allocated.

A folder is untrusted: its JSON may be nested thousands of levels deep, and its numbers may ask for
a billion layers. Nothing here builds or reads a tensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from bench.errors import UserError

BITS_OF_DTYPE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one element, for every dtype of the format."""


class MalformedEntry(Exception):
    """An entry of a safetensors header that no tensor can have."""


def byte_range(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends in the file's data part."""
    start, stop = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    # JSON has true, floats and infinity, which Python would take for numbers below.
    if not all(_is_size(number) for number in (start, stop, *shape)):
        raise MalformedEntry(f"shape or offsets of {name[:80]!r} are not whole numbers from 0 on")
    if dtype not in BITS_OF_DTYPE:
        raise MalformedEntry(f"{name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
    bits = 0 if 0 in shape else BITS_OF_DTYPE[dtype]
    for number in shape:
        bits *= number
        # Before the product of a thousand numbers becomes one of a million digits.
        if bits > 8 * (stop - start):
            break
    if bits != 8 * (stop - start):
        raise MalformedEntry(f"the shape of {name[:80]!r} does not match its size")
    return start, stop


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


MAX_CONFIG_BYTES = 50_000_000
"""Published configs have some thousand bytes; a description of packed experts has a few million."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a small JSON file of a model folder, which is untrusted input.

    Raises:
        UserError: it cannot be read, is too large or too deeply nested, or holds no object.
    """
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file} is corrupt: it has more than {MAX_CONFIG_BYTES} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is corrupt: it is no JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is corrupt: it holds no JSON object")
    return content


_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_WIDTH_KEYS = (
    "hidden_size", "n_embd", "d_model", "embed_dim", "intermediate_size", "moe_intermediate_size",
    "vocab_size", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
)  # fmt: skip


def refuse_impossible_sizes(config: dict[str, Any], where: str, *, tensors: int, bits: int) -> None:
    """Raise if a config states sizes that the weights cannot have, before anything is built.

    Every layer has a tensor of its own, every unit of width at least one bit, and every expert at
    least one bit for each hidden dimension. `tensors` and `bits` are those of all weight files.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_impossible_sizes(value, f"{where}: {key}", tensors=tensors, bits=bits)
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
