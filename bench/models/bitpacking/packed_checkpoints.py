"""Published GPTQ and AWQ checkpoints, loaded as dense weights.

transformers needs the package gptqmodel for both, which is compiled against CUDA. Codes, zero
points and scales determine the weights, so slimbench computes them itself, on any machine.

Layouts: GPTQ as in AutoGPTQ @ 179776b (`auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`), its
second version as in GPTQModel (`convert_gptq_v1_to_v2_format_module`), AWQ as in AutoAWQ @ 7ee2873
(`awq/utils/packing_utils.py`, the version `gemm`).

Shapes: I inputs, O outputs, G groups of inputs, W words of 32 bits, each with 32 / bits values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.weight_files import find_weight_files

if TYPE_CHECKING:
    from bench.models.checkpoints import Packing
    from bench.models.network import NetworkConfig

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each value in a word of AWQ, lowest bits first."""


def unpack_words(words_W: Tensor, bits: int) -> Tensor:
    """Return the values packed in the last dimension of int32 words, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    # Shifting a signed word copies its sign bit, which the mask removes.
    values: Tensor = (words_W[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def gptq_weight(
    qweight_WO: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_I: Tensor, packing: Packing
) -> Tensor:
    """Return the float32 weight [O, I] of a layer: s (q - z), with each input's group."""
    if packing.layout == "gptq":
        # The first version stores z - 1. The 1 is added to whole words with carry, because
        # GPTQModel subtracts it from whole words: a zero point of 0 borrows from the value above
        # it.
        one = sum(1 << shift for shift in range(0, 32, packing.bits))
        qzeros_GW = qzeros_GW + torch.tensor(one, dtype=torch.int64).to(torch.int32)
    zeros_GO = unpack_words(qzeros_GW, packing.bits)
    codes_OI = unpack_words(qweight_WO.T, packing.bits)
    return scales_GO.float().T[:, group_I] * (codes_OI - zeros_GO.T[:, group_I])


def awq_weight(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_I: Tensor) -> Tensor:
    """Return the float32 weight [O, I] of a layer: s (q - z), with each input's group."""

    def values(words: Tensor) -> Tensor:
        places = torch.tensor(AWQ_ORDER).argsort()
        eight: Tensor = unpack_words(words, 4).reshape(*words.shape, len(AWQ_ORDER))
        return eight[..., places].flatten(-2)

    codes_IO, zeros_GO = values(qweight_IW), values(qzeros_GW)
    return (scales_GO.float()[group_I] * (codes_IO - zeros_GO[group_I])).T.contiguous()


def loading_settings(
    folder: Path,
    packing: Packing,
    config: NetworkConfig,
    dtype: torch.dtype,
    wanted: Collection[str],
) -> dict[str, object]:
    """Return the arguments with which `from_pretrained(None, ...)` loads a folder's dense weights.

    `config` is changed to describe a dense network. `wanted` are the names in its state dict.

    Raises:
        UserError: a layer lacks a tensor, or its tensors do not match each other.
    """
    from transformers import GenerationConfig

    del config.quantization_config
    state = dense_state(find_weight_files(folder), packing, dtype, wanted)
    settings: dict[str, object] = {"state_dict": state}
    # Without a folder, transformers does not find the model's own generation config.
    if (folder / "generation_config.json").is_file():
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    return settings


def dense_state(
    files: Sequence[Path], packing: Packing, dtype: torch.dtype, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Return the state dict of the dense network for quantized weights in some files.

    Products of scale and code are exact in float32 and are then rounded to `dtype`.
    """
    from safetensors import safe_open

    with ExitStack() as opened:
        readers = [opened.enter_context(safe_open(file, "pt")) for file in files]
        holders = {name: reader for reader in readers for name in reader.keys()}  # noqa: SIM118
        state: dict[str, Tensor] = {}
        layers = {name.removesuffix(".qweight") for name in holders if name.endswith(".qweight")}
        parts = {f"{layer}.{part}" for layer in layers for part in _PARTS}
        for layer in sorted(layers):
            found = {
                part: holders[f"{layer}.{part}"].get_tensor(f"{layer}.{part}")
                for part in _PARTS
                if f"{layer}.{part}" in holders
            }
            state[f"{layer}.weight"] = _layer_weight(layer, found, packing).to(dtype)
        for name in holders.keys() - parts:
            tensor = holders[name].get_tensor(name)
            layer, _, last = name.rpartition(".")
            # AutoGPTQ gives every layer a bias, which is zero if the network has none.
            if last == "bias" and layer in layers and name not in wanted and not tensor.any():
                continue
            state[name] = tensor
    return state


_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _layer_weight(layer: str, tensors: Mapping[str, Tensor], packing: Packing) -> Tensor:
    missing = [part for part in _PARTS[:3] if part not in tensors]
    if missing:
        raise UserError(f"the quantized layer {layer} has no {missing[0]}")
    qweight, qzeros, scales_GO = (tensors[part] for part in _PARTS[:3])
    each = 32 // packing.bits
    # AWQ packs outputs into words, GPTQ inputs.
    is_awq = packing.layout == "gemm"
    rows, columns = qweight.shape
    inputs, outputs = (rows, each * columns) if is_awq else (each * rows, columns)
    group_I = tensors.get("g_idx")
    if group_I is None:
        group_I = torch.arange(inputs) // (packing.group or inputs)
    fits = (
        scales_GO.shape[-1:] == (outputs,)
        and qzeros.shape == (len(scales_GO), outputs // each)
        and group_I.shape == (inputs,)
        and 0 <= int(group_I.min()) <= int(group_I.max()) < len(scales_GO)
    )
    if not fits:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in tensors.items())
        raise UserError(f"the tensors of the quantized layer {layer} do not fit: {shapes}")
    if is_awq:
        return awq_weight(qweight, qzeros, scales_GO, group_I.long())
    return gptq_weight(qweight, qzeros, scales_GO, group_I.long(), packing)
