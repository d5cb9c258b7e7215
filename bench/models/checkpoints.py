"""Checkpoints other than folders of dense safetensors: GGUF files, LoRA adapters, quantized ones.

A GGUF file is converted once, into a folder of safetensors in the user's cache. An adapter is
checked against the base model's shapes before weights are loaded, and merged into the weights. A
quantized checkpoint is loaded for scoring; its size in bytes is that of its files.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench.data.digests import cache_folder, digest
from bench.errors import MissingData, UserError, one_sentence_errors, optional_module
from bench.models.weight_files import ADAPTER_CONFIG, read_json_object
from bench.ui import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.models.network import TransformersNetwork

GGUF_SUFFIX = ".gguf"
_GGUF_MAGIC = b"GGUF"


def find_gguf(path: Path) -> Path:
    """Return the absolute path of a GGUF file.

    Raises:
        MissingData: there is no such file.
        UserError: it is not a GGUF file.
    """
    if not path.is_file():
        raise MissingData(f"model.path={path} is not a file")
    with path.open("rb") as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
    return path.absolute()


def converted_gguf(file: Path, dtype: torch.dtype) -> Path:
    """Return a folder with a GGUF file's config, tokenizer and dequantized weights.

    Raises:
        UserError: the package gguf is not installed, or transformers cannot convert the file.
    """
    # The result of the conversion may depend on the version of transformers.
    made_by = f"{str(dtype).removeprefix('torch.')}-transformers-{version('transformers')}"
    folder = cache_folder("gguf") / f"{digest(file)}-{made_by}"
    if folder.is_dir():
        return folder
    optional_module("gguf", "gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        with Progress().phase(f"converting {file.name} into safetensors, once"):
            _convert_gguf(file, work, dtype)
        # Two processes may convert at once; the second one discards its own result.
        if not folder.is_dir():
            (work / "converted").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert_gguf(file: Path, work: Path, dtype: torch.dtype) -> None:
    """Convert a GGUF file into the folder `work`/converted."""
    import transformers

    # Linked into a folder of its own, because transformers would also read config and tokenizer
    # files beside the GGUF file, which may belong to another model.
    source = work / "source"
    source.mkdir()
    (source / "model.gguf").symlink_to(file.resolve())
    settings: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions keep weights in the blocks of GGUF if they have a kernel for them.
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Any exception, because the readers do not validate lengths and offsets in the file.
    with one_sentence_errors(file):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **settings)
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **settings, **dense
        )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise UserError(f"{file} lacks {len(missing)} weights, such as {missing[0]}")
    # transformers treats a network from GGUF as quantized and refuses to save it.
    network.hf_quantizer = None
    network.config.__dict__.pop("quantization_config", None)
    network.save_pretrained(work / "converted")
    tokenizer.save_pretrained(work / "converted")


ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
_ADAPTER_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B"
    r"|magnitude_vector(?:\.weight)?)"
)

# Settings that determine the weights of a merged LoRA. The others concern training or name modules
# to import, and are not passed on.
_LORA_SETTINGS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias",
    "use_rslora", "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "lora_bias",
)  # fmt: skip
_UNSUPPORTED_LORA = (
    "layer_replication", "megatron_config", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
# Settings with names of modules. In an untrusted pattern, peft's matching may never end.
_NAMING_MODULES = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
_MODULE_NAME = re.compile(r"[A-Za-z0-9._-]+")


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that determine the weights of a merged LoRA adapter.

    Raises:
        UserError: the folder does not contain a LoRA adapter in safetensors, or one of a kind that
            cannot be merged.
    """
    file = folder / ADAPTER_CONFIG
    key = f"model.adapter={folder}"
    if not file.is_file():
        raise UserError(f"{key} is not an adapter of peft: it has no {ADAPTER_CONFIG}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{key} has no {ADAPTER_WEIGHTS}: only adapters in safetensors are read, since a "
            "pickled file can run code when opened"
        )
    config = read_json_object(file)
    if "peft_type" not in config:
        raise UserError(f"{file} is corrupt: it names no peft_type")
    if (kind := config["peft_type"]) != "LORA":
        raise UserError(f"{key} is of peft_type {kind}: only LORA is merged")
    for name in _UNSUPPORTED_LORA:
        if config.get(name):
            raise UserError(f"{key} sets {name}, which is not merged: train it without")
    for name in _NAMING_MODULES:
        _refuse_patterns(file, name, config.get(name))
    return {name: config[name] for name in _LORA_SETTINGS if name in config}


def _refuse_patterns(file: Path, key: str, value: object) -> None:
    """Raise unless modules are given by name, because peft treats names as regular expressions."""
    # A mapping has a number per name. peft treats a single string as a regular expression.
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list | dict):
        raise UserError(f"{file}: {key}={str(names)[:80]!r} is not a list of module names")
    for name in names:
        if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
            raise UserError(
                f"{file}: {key} has {str(name)[:80]!r}, which is not a module name (letters, "
                "digits, dots, underscores and hyphens): list the names instead of a pattern"
            )


def refuse_other_base(folder: Path, network: nn.Module) -> None:
    """Raise unless every matrix of an adapter fits the module of the network that it changes.

    The network may be on the meta device; no weight is read.
    """
    settings, modules = adapter_settings(folder), dict(network.named_modules())
    state = network.state_dict()
    key, architecture = f"model.adapter={folder}", type(network).__name__
    for name, shape in _adapter_shapes(folder).items():
        found = _ADAPTER_KEY.fullmatch(name)
        # With a matrix of the head or the embedding, peft also stores the weight that it adds to.
        target = found["module"] if found else name.replace(".base_layer.", ".")
        weight = state.get(f"{target}.weight" if found else target)
        if weight is None:
            raise UserError(
                f"{key} is for another base: it changes {target}, which {architecture} lacks"
            )
        module = modules[target if found else target.rpartition(".")[0]]
        wanted = _wanted_shape(found["part"] if found else "", module, tuple(weight.shape))
        if len(wanted) != len(shape) or any(
            size not in (None, given) for size, given in zip(wanted, shape, strict=True)
        ):
            raise UserError(
                f"{key} is for another base: its {name} is {_product(shape)}, and {target} of "
                f"{architecture} is {_product(weight.shape)}"
            )
        if _is_tied(network, module):
            # Merging would also change the tied matrix, which it did not do in training.
            raise UserError(f"{key} changes {target}: {architecture} ties its head and embedding")
    if not settings.get("target_modules"):
        raise UserError(f"{key} names no target_modules")


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an adapter by its name in the base model."""
    from safetensors import SafetensorError, safe_open

    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is corrupt: {str(error).splitlines()[0]}") from None
    if not shapes or not all(key.startswith(_ADAPTER_PREFIX) for key in shapes):
        raise UserError(f"{file} does not contain adapter weights as peft writes them")
    return {key.removeprefix(_ADAPTER_PREFIX): shape for key, shape in shapes.items()}


def _wanted_shape(part: str, module: nn.Module, weight: tuple[int, ...]) -> tuple[int | None, ...]:
    """Return the shape that part of an adapter needs for a weight; None where any size fits."""
    if not part:  # A module that was trained as a whole.
        return weight
    rows, columns = weight
    # Conv1D, as in GPT-2, stores its weight as [in, out].
    outputs, inputs = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
    if part.startswith("magnitude_vector"):
        return (outputs,)
    return {
        "A.weight": (None, inputs),
        "B.weight": (outputs, None),
        "embedding_A": (None, rows),
        "embedding_B": (columns, None),
    }[part]


def _is_tied(network: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is the embedding or the head of a network that ties them."""
    # Imported here, because finding a model's files must not import torch.
    from bench.models.network import text_config

    typed = cast("TransformersNetwork", network)
    # From the config, because tied weights are separate tensors on the meta device.
    tied = bool(getattr(text_config(network), "tie_word_embeddings", False))
    return tied and module in (typed.get_input_embeddings(), typed.get_output_embeddings())


def _product(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def merge_adapter(network: nn.Module, folder: Path) -> nn.Module:
    """Merge a LoRA adapter into the weights of its base model, and return the network.

    Raises:
        UserError: peft is not installed, or settings and weights of the adapter do not agree.
    """
    peft = optional_module("peft", "adapters")
    config = peft.LoraConfig(**adapter_settings(folder), inference_mode=True)
    adapted = peft.PeftModel.from_pretrained(network, folder, config=config)
    reached = {
        name.removeprefix(_ADAPTER_PREFIX)
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    matches = map(_ADAPTER_KEY.fullmatch, _adapter_shapes(folder))
    if reached != {found["module"] for found in matches if found}:
        raise UserError(f"model.adapter={folder}: its target_modules and its weights do not agree")
    # `safe_merge` raises if a merged weight would be NaN.
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged


# Package of each quantizer, as imported and as installed; None if slimbench itself unpacks weights.
_QUANTIZERS = {
    "compressed-tensors": ("compressed_tensors", "'slimbench[quantized]'"),
    "gptq": None,
    "awq": None,
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
}


# Of quantizers that slimbench unpacks. With 3 bits a code may cross words, in different layouts.
_PACKED_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}


@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs its codes; `group` inputs share a scale, all of them if None."""

    layout: str
    bits: int
    group: int | None


@dataclass(frozen=True)
class Quantization:
    """How a published checkpoint is quantized.

    `method` is transformers' name for it. `bytes` is the size of the tensors in the files,
    including scales and zero points. `parameters` is the number of the dense network's parameters,
    counted when it is built. `mixed` is true if layers outside the experts have different schemes.
    `packing` is set if slimbench unpacks the weights instead of transformers.
    """

    method: str
    bytes: int
    quantizes_activations: bool = False
    mixed: bool = False
    packing: Packing | None = None
    parameters: int = 0

    @property
    def library(self) -> str | None:
        """Package that unpacks the weights; None if slimbench does."""
        needed = _QUANTIZERS[self.method]
        return None if needed is None else needed[0]

    @property
    def dequantized(self) -> bool:
        """Whether weights are dequantized on loading, so that computations use dense ones."""
        # When transformers dequantizes, it uses a single scheme for all dense layers. With several
        # schemes, it keeps the layers compressed.
        plain = not self.quantizes_activations and not self.mixed
        return (self.method == "compressed-tensors" and plain) or self.packing is not None

    @property
    def loading_settings(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for this checkpoint."""
        if not self.dequantized or self.packing is not None:
            return {}
        # compressed-tensors dequantizes weights in the first forward at the latest. Doing it on
        # loading keeps the network the same throughout.
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def read_quantization(folder: Path, stored: object, files: tuple[Path, ...]) -> Quantization:
    """Return how a folder's checkpoint is quantized; `stored` is the entry in its config.json.

    Raises:
        UserError: the quantization method is not supported, or its package is not installed.
    """
    stored = stored if isinstance(stored, dict) else {}
    method = stored.get("quant_method")
    if method not in _QUANTIZERS:
        raise UserError(
            f"{folder} is quantized by {method}, which is not supported: "
            f"allowed: {', '.join(_QUANTIZERS)}"
        )
    stored_bytes = sum(map(_tensor_bytes, files))
    if (needed := _QUANTIZERS[method]) is None:
        packing = _read_packing(folder, stored)
        return Quantization(method, stored_bytes, packing=packing)
    package, install = needed
    if find_spec(package) is None:
        raise UserError(f"{folder} is quantized by {method}: pip install {install}")
    groups = stored.get("config_groups")
    schemes = (
        [s for s in groups.values() if isinstance(s, dict)] if isinstance(groups, dict) else []
    )
    activations = any(scheme.get("input_activations") for scheme in schemes)
    return Quantization(method, stored_bytes, activations, _is_mixed(schemes))


def _read_packing(folder: Path, stored: dict[str, Any]) -> Packing:
    """Return the packing stated by a folder's `quantization_config`, if slimbench can unpack it."""
    method: str = stored["quant_method"]
    bits: Any = stored.get("bits", stored.get("w_bit"))
    group = stored.get("group_size", stored.get("q_group_size", -1))
    key = {"gptq": "checkpoint_format", "awq": "version"}[method]
    layout = str(stored.get(key) or _LAYOUTS[method][0]).lower()
    for name, value, allowed in (("bits", bits, _PACKED_BITS), (key, layout, _LAYOUTS)):
        if value not in allowed[method]:
            raise UserError(
                f"{folder} is quantized by {method} with {name}={value}, which is not supported: "
                f"allowed: {', '.join(map(str, allowed[method]))}"
            )
    if type(group) is not int or not (group == -1 or group > 0):
        raise UserError(f"{folder / 'config.json'} is corrupt: group_size={group!r}")
    return Packing(layout, int(bits), None if group == -1 else group)


def _is_mixed(schemes: list[dict[str, Any]]) -> bool:
    """Return whether transformers would dequantize some layer with the scheme of another one."""
    # transformers uses the first scheme that names experts for all experts, and the first of the
    # others for all other layers (`transformers.integrations.compressed_tensors`).
    of_experts = [scheme for scheme in schemes if "experts" in str(scheme.get("targets"))]
    others = [scheme for scheme in schemes if scheme not in of_experts]
    dense = (others or schemes)[:1]
    return any(
        scheme.get("weights") != dense[0].get("weights") for scheme in [*others, *of_experts[1:]]
    )


def _tensor_bytes(file: Path) -> int:
    """Return the size of a safetensors file without its header."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
