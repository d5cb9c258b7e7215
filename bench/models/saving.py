"""Export of a network as a Hugging Face folder, in the plainest format that can hold it.

`stock`: as published, or with one width for all experts, so that transformers loads it. `padded`:
the same for experts of different widths, zero-padded to the widest. `slimbench`: as in memory,
ragged or packed, with a `slimbench.json` that `bench.models.loading` reads. `classifier`: an image
classifier's own config and weights, and on request an ONNX file. All weights are safetensors.

Padding does not change the outputs: a micro-expert of zeros computes act(0) · 0 = 0.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from bench.errors import UserError
from bench.models import replaced_modules
from bench.models.classifiers import classifier, serialization
from bench.models.model import Model
from bench.models.network import NetworkConfig, TransformersNetwork
from bench.models.offload import is_offloaded
from bench.models.structure.model_structure import ModelStructure, inspect_model
from bench.models.structure.moe_block import MoEBlock

ExportFormat = Literal["stock", "padded", "slimbench", "classifier"]


def save_model(model: Model, folder: Path, *, pad: bool, onnx: bool = False) -> ExportFormat:
    """Write network and tokenizer or processor to a folder, and return the format.

    With `pad`, ragged experts are zero-padded so that stock transformers loads them. With `onnx`,
    an image classifier is written as ONNX as well.

    Raises:
        UserError: no format can hold the network, it is offloaded, or the requested format does not
            exist for its kind of model.
    """
    network = model.network
    if isinstance(network, classifier.Classifier):
        return _save_classifier(network, folder, pad=pad, onnx=onnx)
    if onnx:
        raise UserError(f"--onnx is for image classifiers; {model.structure.architecture} is none")
    if model.quantization is not None:
        raise UserError(
            f"{model.name} is quantized by {model.quantization.method} already: its own folder is "
            "what could be exported"
        )
    if is_offloaded(network):
        raise UserError("a model is written from memory only: set model.device_map=null")
    description = replaced_modules.describe_network(network)
    # Before the first byte is written: a folder that loads as a different network is worse than
    # none.
    refuse_unsavable(network, description)
    form = "stock" if description is None else _replaced_format(model, description, pad=pad)
    (model.processor or model.tokenizer).save_pretrained(folder)
    whole = cast(TransformersNetwork, network)
    if description is None:
        whole.save_pretrained(folder)
    elif form == "slimbench":
        # By default, transformers converts fused experts back to the checkpoint's per-expert names,
        # a mapping that does not know ragged or packed weights.
        whole.save_pretrained(folder, save_original_format=False)
        replaced_modules.write_description(description, folder)
    else:
        padded = padded_network(network, model.structure, common_widths(whole, model.structure))
        cast(TransformersNetwork, padded).save_pretrained(folder)
    return form


def _save_classifier(
    network: classifier.Classifier, folder: Path, *, pad: bool, onnx: bool
) -> ExportFormat:
    """Write an image classifier, whose config describes its full shape."""
    if pad:
        raise UserError(f"--padded is for MoE models; {network.config.architecture} has no experts")
    serialization.save_classifier(network, folder)
    if onnx:
        serialization.save_onnx(network, folder)
    return "classifier"


def _replaced_format(
    model: Model, description: replaced_modules.Description, *, pad: bool
) -> ExportFormat:
    """Return the plainest format that holds a network with replaced or packed modules."""
    if any(description["packed"].values()):
        if pad:
            raise UserError("packed weights cannot be padded: leave out --padded")
        return "slimbench"
    # Experts in a form of their own (a shared base, a masked router) have no widths to compare.
    stored = {spec["class"] for spec in description["modules"].values()}
    if not stored <= PADDABLE_CLASSES or not model.structure.blocks:
        if pad:
            names = ", ".join(sorted(stored))
            raise UserError(f"{names} cannot be padded: leave out --padded")
        return "slimbench"
    # Equal widths need no description: the config can state them, and the folder stays loadable
    # without slimbench.
    widths = common_widths(cast(TransformersNetwork, model.network), model.structure)
    if all_experts_have(model.structure, widths):
        return "stock"
    return "padded" if pad else "slimbench"


def refuse_unsavable(network: nn.Module, description: replaced_modules.Description | None) -> None:
    """Raise if config and description would not rebuild the network as it is."""
    whole = cast(TransformersNetwork, network)
    for name, module in network.named_modules():
        # Such as a decoder that skips work for visual tokens: the folder would be the dense model.
        if "forward" in vars(module):
            raise UserError(
                f"what {name or 'the network'} computes is replaced while it runs, which no folder "
                "can hold: give the method in each run instead of exporting it"
            )
    rebuilt = meta_network(whole.config, whole.dtype)
    if description is not None:
        with torch.device("meta"):
            replaced_modules.install_described_modules(rebuilt, description)
    known = dict(rebuilt.named_modules())
    for name, module in network.named_modules():
        # Exact types, not isinstance: a subclass with a different forward would be rebuilt as its
        # base.
        if name and type(module) is not type(known.get(name)):
            raise UserError(
                f"{name} is a {type(module).__name__}, which cannot be written to a folder"
            )
    # On the meta device, so the check costs no memory for weights.
    shapes = {key: weight.shape for key, weight in rebuilt.state_dict().items()}
    for key, weight in network.state_dict().items():
        if shapes.get(key) != weight.shape:
            raise UserError(f"{key} has a shape that differs from the network's config")


# Replaced modules that a published network with wider experts can stand for.
PADDABLE_CLASSES = {"RaggedExperts", "GatedExpert"}

# transformers' grouped matmuls need rows of whole 16 bytes, that is 8 half-precision numbers.
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class ExpertWidths:
    """Widths in a config: of every routed expert, and of all shared experts together."""

    routed: int
    shared: int


def common_widths(network: TransformersNetwork, structure: ModelStructure) -> ExpertWidths:
    """Return the smallest widths that hold every expert, fit the config's fields, and run."""
    config = network.config
    # A width of 0 is no valid config, so a block whose experts are all empty gets one zero
    # micro-expert.
    routed = max((1, *(width for block in structure.moe for width in block.widths)))
    shared = max((block.d_shared for block in structure.moe), default=0)
    # DeepSeek's config has no separate width for shared experts: they are `n_shared_experts` times
    # as wide as a routed one, so one width has to satisfy both.
    count = getattr(config, "n_shared_experts", None)
    if count:
        routed = max(routed, -(-shared // count))
    routed = -(-routed // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if count:
        shared = count * routed
    elif hasattr(config, "shared_expert_intermediate_size"):
        shared = max(1, shared)
    return ExpertWidths(routed, shared)


def all_experts_have(structure: ModelStructure, widths: ExpertWidths) -> bool:
    """Whether every expert already has these widths, so that no padding is needed."""
    return all(
        set(block.widths) == {widths.routed} and block.d_shared == widths.shared
        for block in structure.moe
    )


@torch.no_grad()
def padded_network(
    network: nn.Module, structure: ModelStructure, widths: ExpertWidths
) -> nn.Module:
    """Return a network of the published class, with every expert padded to the widths.

    All weights except the experts' are shared with `network`, and non-persistent buffers have no
    value: the result is for saving, not for running.
    """
    whole = cast(TransformersNetwork, network)
    shell = meta_network(_config_with_widths(whole.config, widths), whole.dtype)
    # `assign` shares the tensors instead of copying into meta tensors, which have no storage;
    # `strict=False` leaves out the experts, which are filled next.
    shell.load_state_dict(_non_expert_state(network, structure), strict=False, assign=True)
    for target, source in zip(inspect_model(shell).moe, structure.moe, strict=True):
        _fill_block(target, source)
    return shell


def meta_network(config: NetworkConfig, dtype: torch.dtype) -> nn.Module:
    """Build a network of the shape in a config, on the meta device."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        network = auto.from_config(copy.deepcopy(config), dtype=dtype)
    return cast(nn.Module, network)


def _config_with_widths(config: NetworkConfig, widths: ExpertWidths) -> NetworkConfig:
    """Return a copy of the config with the widths, under its architecture's field names."""
    changed = copy.deepcopy(config)
    own = "moe_intermediate_size"
    setattr(changed, own if hasattr(config, own) else "intermediate_size", widths.routed)
    if hasattr(config, "shared_expert_intermediate_size"):
        setattr(changed, "shared_expert_intermediate_size", widths.shared)  # noqa: B010
    return changed


def _non_expert_state(network: nn.Module, structure: ModelStructure) -> dict[str, torch.Tensor]:
    """Return the state of everything except routed and shared experts."""
    # By identity, not by name: names of experts differ between architectures. `keep_vars` returns
    # the parameters themselves, without which identities would be those of detached copies.
    ours = {id(weight) for block in structure.moe for weight in block.experts.parameters()}
    for block in structure.moe:
        ours |= {id(weight) for weight in block.shared.parameters()} if block.shared else set()
    state = network.state_dict(keep_vars=True)
    return {key: weight.detach() for key, weight in state.items() if id(weight) not in ours}


def _fill_block(target: MoEBlock, source: MoEBlock) -> None:
    """Allocate a block's experts and copy another block's weights, zeros elsewhere."""
    # The experts themselves may be empty (all widths 0), the router never is.
    device = next(source.router.parameters()).device
    for part in (target.experts, target.shared):
        if part is not None:
            part.to_empty(device=device)
            for weight in part.parameters():
                weight.zero_()
    pairs = [(target.expert(e), source.expert(e)) for e in range(source.num_experts)]
    shared = (target.shared_view(), source.shared_view())
    for wide, narrow in (*pairs, shared):
        if wide is not None and narrow is not None:
            wide.copy_(narrow)
