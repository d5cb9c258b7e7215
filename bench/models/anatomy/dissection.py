"""Finding the decoder layers and MoE blocks of a network, on any device including meta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bench.errors import UserError
from bench.models.anatomy.moe import MoEBlock
from bench.models.anatomy.understanding import NotUnderstoodError, understand
from bench.models.vision import Classifier, VisionConfig


@dataclass(frozen=True)
class Anatomy:
    """The parts of a network that methods change.

    `layers` are the decoder layers in order, none in an image classifier, which is described by
    `vision`. `parameters` counts every weight once, tied ones too. `refusal` says why the MoE
    blocks are not understood; asking for them then raises it.
    """

    architecture: str
    model_type: str
    layers: tuple[nn.Module, ...]
    parameters: int
    blocks: tuple[MoEBlock, ...] = ()
    refusal: str | None = None
    vision: VisionConfig | None = None

    @property
    def moe(self) -> tuple[MoEBlock, ...]:
        """The MoE blocks in layer order, dense layers left out; refused if not understood."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.blocks

    @property
    def moe_parameters(self) -> int:
        """How many weights all routed and shared experts hold together."""
        return sum(block.parameters for block in self.moe)


def dissect(network: nn.Module) -> Anatomy:
    """Return the anatomy of a network by looking at its modules; nothing is computed."""
    if isinstance(network, Classifier):
        return _classifier(network)
    config = getattr(network, "config", None)
    architecture = type(network).__name__
    layers = _decoder_layers(network)
    blocks: tuple[MoEBlock, ...] = ()
    refusal = None
    try:
        blocks = _moe_blocks(network, layers, _text_config(config))
    except NotUnderstoodError as difference:
        refusal = f"{architecture} has experts that slimbench does not understand: {difference}"
    return Anatomy(
        architecture=architecture,
        model_type=str(getattr(config, "model_type", architecture)),
        layers=layers,
        parameters=sum(weight.numel() for weight in network.parameters()),
        blocks=blocks,
        refusal=refusal,
    )


def _classifier(network: Classifier) -> Anatomy:
    """Return the anatomy of an image classifier, which has no decoder layers."""
    return Anatomy(
        architecture=network.config.architecture,
        model_type="image_classifier",
        layers=(),
        parameters=sum(weight.numel() for weight in network.parameters()),
        vision=network.config,
    )


def _text_config(config: Any) -> Any:
    """Return the config of the language part, which is the whole one in a text model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _decoder_layers(network: nn.Module) -> tuple[nn.Module, ...]:
    """Return the longest of the outermost lists of modules in the decoder; empty without one."""
    whole: Any = network
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    stacks = [
        (name.count("."), -len(module), tuple(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return min(stacks, key=lambda stack: stack[:2], default=(0, 0, ()))[2]


def _moe_blocks(
    network: nn.Module, layers: tuple[nn.Module, ...], config: Any
) -> tuple[MoEBlock, ...]:
    """Describe the MoE block of every layer that has one."""
    names = {module: name for name, module in network.named_modules()}
    top_k = getattr(config, "num_experts_per_tok", None)
    found = []
    for index, layer in enumerate(layers):
        owners = [m for m in layer.modules() if isinstance(getattr(m, "experts", None), nn.Module)]
        if not owners:
            _refuse_hidden_experts(layer, names)
        for block in owners:
            try:
                found.append(understand(index, names[block], block, top_k))
            except NotUnderstoodError as difference:
                raise NotUnderstoodError(f"in {names[block]}, {difference}") from None
    return tuple(found)


def _refuse_hidden_experts(layer: nn.Module, names: dict[nn.Module, str]) -> None:
    """Raise when a layer without an `experts` part holds experts in some other form."""
    for module in layer.modules():
        if "Experts" in type(module).__name__:
            raise NotUnderstoodError(f"{names[module]} is a {type(module).__name__}")
