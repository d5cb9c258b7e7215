"""Packed networks as compressed-tensors checkpoints, which transformers, vLLM and SGLang load.

Every packed matrix becomes `weight_packed`, the codes in 32-bit words, `weight_scale`,
`weight_shape` and, unless its grid is symmetric, `weight_zero_point`. The `quantization_config` of
config.json lists the modules of each scheme (bits, symmetry and group size) and the modules that
stay dense (https://github.com/vllm-project/compressed-tensors, format `pack-quantized`).

An engine computes all routed experts of a block in one kernel, so they share a scheme, and
transformers loads only symmetric grids for them. In this format a matrix has a single bit width.
Folders for other engines also load in transformers.

Shapes: R rows, C columns, G groups, E experts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError, optional_module
from bench.models.bitpacking.packed_modules import PackedExperts, PackedLinear, packed_linears
from bench.models.network import NetworkConfig, TransformersNetwork
from bench.models.serving.engines import Engine
from bench.models.serving.expert_widths import (
    all_experts_have,
    common_widths,
    config_with_widths,
    meta_network,
    network_shape,
    save_shell,
)
from bench.models.structure.expert_view import PROJECTION_NAMES
from bench.models.structure.model_structure import ModelStructure, inspect_model

METHOD = "compressed-tensors"
EXTRA = "quantized"


class Scheme(NamedTuple):
    """How a matrix is quantized; without a group, each row has a single grid."""

    bits: int
    symmetric: bool
    group: int | None

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "with zero points"
        return f"{self.bits} bits, {kind}, {f'group {self.group}' if self.group else 'by row'}"


@dataclass(frozen=True)
class CompressedNetwork:
    """Names and schemes of a network's packed matrices; `config` states their widths."""

    config: NetworkConfig
    schemes: Mapping[str, Scheme]
    """Keys are names of modules in the network."""

    @property
    def groups(self) -> list[Scheme]:
        """The distinct schemes, that of the routed experts first."""
        # transformers takes the first group that names experts as that of the routed ones.
        return list(dict.fromkeys(self.schemes.values()))


def plan_compressed(
    network: TransformersNetwork, structure: ModelStructure, engine: Engine
) -> CompressedNetwork:
    """Check that a packed network is valid in compressed-tensors and supported by an engine.

    Nothing is dequantized or written.

    Raises:
        UserError: it is not, with the name of the module; or the package is not installed.
    """
    optional_module("compressed_tensors", EXTRA)
    config = _config_of_widths(network, structure, engine)
    shell = meta_network(config, network.dtype)
    linears = list(packed_linears(cast(nn.Module, network)))
    for check in _MATRIX_CHECKS:
        for name, linear in linears:
            check(name, linear, engine)
    routed: dict[str, Scheme] = {}
    others: dict[str, Scheme] = {}
    for name, linear in linears:
        scheme = _scheme(linear)
        container = name.rpartition(".")[0].rpartition(".")[0]
        inside = isinstance(cast(nn.Module, network).get_submodule(container), PackedExperts)
        (routed if inside else others)[name] = scheme
        if not inside and not isinstance(shell.get_submodule(name), nn.Linear):
            kind = type(shell.get_submodule(name)).__name__
            raise UserError(f"{name} is a {kind}, but compressed-tensors quantizes only Linear")
    _check_experts(routed, engine)
    _check_zero_points({**routed, **others})
    return CompressedNetwork(config, {**routed, **others})


def _config_of_widths(
    network: TransformersNetwork, structure: ModelStructure, engine: Engine
) -> NetworkConfig:
    """Return a config with the widths of packed experts, which may have been pruned."""
    if not structure.moe:
        return copy.deepcopy(network.config)
    widths = common_widths(network.config, structure, 1)
    if not all_experts_have(structure, widths):
        raise UserError(
            "the quantized experts have different widths, and packed weights cannot be padded: "
            "prune with scope=expert and aligned=true, or export without --for"
        )
    published = inspect_model(meta_network(network.config, network.dtype))
    if all_experts_have(published, widths):
        return copy.deepcopy(network.config)
    if widths.routed % engine.multiple:
        raise UserError(
            f"the quantized experts are {widths.routed} wide, but {engine.name} needs "
            f"multiples of {engine.multiple}: prune with aligned=true and align={engine.multiple}"
        )
    network_shape(network, widths)
    return config_with_widths(network.config, widths)


def _refuse_mixed_matrix(name: str, linear: PackedLinear, engine: Engine) -> None:
    found = sorted({level.bits for level in linear.shape.levels}, reverse=True)
    if len(found) != 1 or linear.shape.permuted:
        mixed = " and ".join(map(str, found))
        raise UserError(
            f"{name} has {mixed} bits in one matrix, but compressed-tensors allows one bit width "
            "per matrix: quantize with one (gptq, rtn, awq, or camera_q with bits=[4] shares=[1])"
        )


def _refuse_grid(name: str, linear: PackedLinear, engine: Engine) -> None:
    if linear.shape.grid == "offset":
        raise UserError(
            f"{name} has grids with any offset, but compressed-tensors needs grids with a code "
            "for 0: quantize with grid=symmetric, or grid=zero_point in a model without experts"
        )


def _refuse_bits(name: str, linear: PackedLinear, engine: Engine) -> None:
    bits = linear.shape.levels[0].bits
    if bits not in engine.bits:
        allowed = ", ".join(map(str, engine.bits))
        raise UserError(
            f"{name} has {bits} bits, which {engine.name} does not support: allowed: {allowed}"
        )


def _refuse_group(name: str, linear: PackedLinear, engine: Engine) -> None:
    columns, group = linear.shape.columns, _scheme(linear).group
    if group is not None and engine.groups is not None and group not in engine.groups:
        allowed = ", ".join(map(str, engine.groups))
        raise UserError(
            f"{name} has groups of {group}, which {engine.name} does not support: allowed: "
            f"{allowed}, or one wider than the matrix"
        )
    if group is not None and columns % group:
        raise UserError(
            f"{name} has {columns} columns, which is not a multiple of the group size {group}: "
            "quantize with a group that divides them"
        )


# In this order over all matrices, so that faults that no choice of grid or group cures come first.
_MATRIX_CHECKS = (_refuse_mixed_matrix, _refuse_grid, _refuse_bits, _refuse_group)


def _scheme(linear: PackedLinear) -> Scheme:
    shape = linear.shape
    group = None if shape.columns < shape.group else shape.group
    return Scheme(shape.levels[0].bits, symmetric=shape.grid == "symmetric", group=group)


def _check_experts(routed: Mapping[str, Scheme], engine: Engine) -> None:
    first, *rest = routed.items() or [("", Scheme(8, symmetric=True, group=None))]
    for name, scheme in rest:
        if scheme != first[1]:
            raise UserError(
                f"{first[0]} has {first[1]}, but {name} {scheme}: {engine.name} requires the same "
                "scheme for all routed experts of a model"
            )
    if not first[1].symmetric:
        raise UserError(
            f"{first[0]} has zero points, but {engine.name} supports routed experts only with "
            "symmetric grids: quantize with grid=symmetric"
        )


def _check_zero_points(schemes: Mapping[str, Scheme]) -> None:
    # On compressed weights, transformers expects unpacked zero points; when it dequantizes on
    # loading, it uses a single scheme for all layers.
    different = {scheme: name for name, scheme in schemes.items()}
    if len(different) > 1 and not all(scheme.symmetric for scheme in different):
        (one, name), (other, another), *_ = different.items()
        raise UserError(
            f"{name} has {one}, but {another} {other}: transformers supports zero points only if "
            "all layers have the same scheme: quantize with grid=symmetric, or set attention_bits "
            "equal to bits"
        )


def save_compressed(network: TransformersNetwork, plan: CompressedNetwork, folder: Path) -> None:
    """Write config.json and the weights, under the names of the published checkpoint."""
    shell = meta_network(plan.config, network.dtype)
    named = _published_state(cast(nn.Module, network), shell)
    tensors: dict[str, Tensor] = {}
    packed: dict[Scheme, list[str]] = {scheme: [] for scheme in plan.groups}
    for key, value in named.items():
        if isinstance(value, Tensor):
            tensors[key] = value
            continue
        name, linear = value
        module = key.removesuffix(".weight")
        packed[plan.schemes[name]].append(module)
        tensors |= {f"{module}.{part}": t for part, t in _packed_tensors(linear).items()}
    dense = [
        key.removesuffix(".weight")
        for key, value in named.items()
        if isinstance(value, Tensor) and value.ndim == 2 and key.endswith(".weight")
    ]
    config: Any = cast(TransformersNetwork, shell).config
    config.quantization_config = quantization_config(packed, dense)
    # With names unchanged, because a second conversion would not recognise the packed tensors.
    save_shell(shell, network, folder, state_dict=tensors, save_original_format=False)


def _published_state(
    network: nn.Module, shell: nn.Module
) -> dict[str, Tensor | tuple[str, PackedLinear]]:
    """Return weights and packed matrices by their names in a published checkpoint.

    transformers stores the experts of a block fused, and has a conversion to separate ones. It is
    called with tensors whose values are numbers of our matrices, so that the position of a number
    in its result shows the matrix's name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    linears = list(packed_linears(network))
    number = {name: place for place, (name, _) in enumerate(linears)}
    state: dict[str, Tensor] = {
        f"{name}.weight": torch.tensor([[place]], dtype=torch.int32)
        for name, place in number.items()
    }
    for name, module in network.named_modules():
        if isinstance(module, PackedExperts):
            state |= _numbered_experts(name, len(module), number, shell, state)
    for key, weight in network.state_dict().items():
        owner, _, part = key.rpartition(".")
        if owner not in number or part == "bias":
            state[key] = weight
    reverted = revert_weight_conversion(shell, state)
    # A dtype that no weight of a network has.
    return {
        key: linears[int(value)] if value.dtype == torch.int32 else value
        for key, value in reverted.items()
    }


def _numbered_experts(
    name: str, count: int, number: Mapping[str, int], shell: nn.Module, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the entries of a block's experts, and remove their matrices from the single ones."""
    parts = PROJECTION_NAMES[0]
    for expert in range(count):
        for part in parts:
            del state[f"{name}.{expert}.{part}.weight"]
    gate_E, up_E, down_E = (
        torch.tensor([number[f"{name}.{e}.{part}"] for e in range(count)], dtype=torch.int32)
        for part in parts
    )
    experts = shell.get_submodule(name)
    if isinstance(experts, nn.ModuleList):
        own = next(names for names in PROJECTION_NAMES if hasattr(experts[0], names[0]))
        return {
            f"{name}.{e}.{part}.weight": numbers_E[e].view(1, 1)
            for part, numbers_E in zip(own, (gate_E, up_E, down_E), strict=True)
            for e in range(count)
        }
    return {
        f"{name}.gate_up_proj": torch.stack((gate_E, up_E), 1)[:, :, None],
        f"{name}.down_proj": down_E[:, None, None],
    }


def _packed_tensors(linear: PackedLinear) -> dict[str, Tensor]:
    """Return the tensors of one matrix in the form of compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, shape = linear.shape.levels[0].bits, linear.shape
    # Both libraries number codes from 0; compressed-tensors declares them as signed, centred on 0.
    half = 2 ** (bits - 1)
    codes_RC = (linear.code_matrix().to(torch.int16) - half).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes_RC, bits),
        # In the dtype of engines, in any of which the grid's scales are exact.
        "weight_scale": linear.scale.to(linear.dtype),
        "weight_shape": torch.tensor([shape.rows, shape.columns]),
    }
    if shape.grid == "zero_point":
        zero_RG = (linear.zero_point.to(torch.int16) - half).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero_RG, bits, packed_dim=0)
    return tensors


def quantization_config(
    packed: Mapping[Scheme, Iterable[str]], dense: Iterable[str]
) -> dict[str, Any]:
    """Return the `quantization_config` for modules by scheme and for those left dense."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    named = {scheme: set(names) for scheme, names in packed.items()}
    everything = {*dense, *(name for names in named.values() for name in names)}
    config = QuantizationConfig(
        config_groups={
            f"group_{place}": QuantizationScheme(
                targets=name_patterns(names, everything),
                weights=QuantizationArgs(
                    num_bits=scheme.bits,
                    symmetric=scheme.symmetric,
                    strategy="group" if scheme.group else "channel",
                    group_size=scheme.group,
                ),
                format="pack-quantized",
            )
            for place, (scheme, names) in enumerate(named.items())
        },
        ignore=name_patterns(set(dense), everything),
        format="pack-quantized",
        quantization_status="compressed",
    )
    stored: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    if not all(scheme.symmetric for scheme in named):
        # transformers expects packed zero points unpacked unless it dequantizes on loading.
        stored["dequantize"] = True
    return stored | {"quant_method": METHOD}


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_EXPERT = re.compile(r"(?P<list>.*\.experts\.\d+)\.\w+")


def name_patterns(names: set[str], everything: set[str]) -> list[str]:
    """Return targets that match these names of modules and no others of `everything`.

    There is one target per kind of module: numbers of layers and experts are wildcards if all
    modules of the kind are among the names, and so are the projections of an expert, whose names
    differ between checkpoints and engines.
    """
    patterns: list[str] = []
    for name in sorted(names):
        if any(_matches(pattern, name) for pattern in patterns):
            continue
        exact = f"re:{re.escape(name)}$"
        candidates = [f"re:{_open_numbers(name)}$", exact]
        if found := _EXPERT.fullmatch(name):
            candidates.insert(0, rf"re:{_open_numbers(found['list'])}\.\w+$")
        patterns.append(
            next(
                pattern
                for pattern in candidates
                if pattern == exact or {n for n in everything if _matches(pattern, n)} <= names
            )
        )
    return patterns


def _open_numbers(name: str) -> str:
    return r"\d+".join(re.escape(part) for part in _NUMBER.split(name))


def _matches(pattern: str, name: str) -> bool:
    return re.match(pattern.removeprefix("re:"), name) is not None
