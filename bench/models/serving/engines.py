"""Inference engines, and the weights that each of them supports.

The facts are from the engines' own code: the keys of config.json that they read, the tile sizes of
their kernels, and the bit widths that these unpack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.errors import UserError

ALIGNMENTS = (64, 128)


@dataclass(frozen=True)
class Engine:
    """An engine: widths of experts must be multiples of `multiple`, quantized weights have `bits`.

    `groups` are the group sizes of quantized weights besides whole rows, None if all are supported.
    `loading` is the command or code for a model card, with THIS_FOLDER for the folder.
    """

    name: str
    multiple: int
    bits: tuple[int, ...]
    groups: tuple[int, ...] | None
    loading: str


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            # Its grouped matmuls need rows of multiples of 16 bytes, which is 8 half-precision
            # numbers.
            multiple=8,
            bits=tuple(range(1, 9)),
            groups=None,
            loading='AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        ),
        Engine(
            "vllm",
            # Marlin works on tiles of 64 columns, and supports 4 or 8 bits in these groups
            # (`vllm/model_executor/layers/quantization/utils/marlin_utils.py`).
            multiple=64,
            bits=(4, 8),
            groups=(32, 64, 128),
            loading="vllm serve THIS_FOLDER",
        ),
        Engine(
            "sglang",
            # The same kernels (`python/sglang/srt/layers/quantization/compressed_tensors`).
            multiple=64,
            bits=(4, 8),
            groups=(32, 64, 128),
            loading="python -m sglang.launch_server --model-path THIS_FOLDER",
        ),
    )
}


def loading_engines(engine: Engine | None) -> list[Engine]:
    """Return the engines that load a folder written for one of them, always with transformers."""
    stock = ENGINES["transformers"]
    served = [] if engine is None or engine.name == stock.name else ["vllm", "sglang"]
    return [*map(ENGINES.__getitem__, served), stock]


def find_engine(name: str, align: int | None = None) -> Engine:
    """Return an engine, with widths aligned to `align` instead of its smallest multiple.

    Raises:
        UserError: the engine is unknown, or the alignment is not one of `ALIGNMENTS`.
    """
    if name not in ENGINES:
        raise UserError(f"--for {name} is not a known engine: allowed: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if align is None:
        return engine
    if align not in ALIGNMENTS:
        raise UserError(f"--align {align} is not allowed: give {' or '.join(map(str, ALIGNMENTS))}")
    return replace(engine, multiple=align)
