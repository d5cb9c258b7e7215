"""Decoder layers and MoE blocks of a network, found on any device, including meta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn

from bench.errors import UserError
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.network import TransformersNetwork, text_config
from bench.models.structure.moe_block import (
    EXPERT_COUNT_NAMES,
    MoEBlock,
    UnsupportedStructure,
    dense_block_of,
    moe_block_of,
)


class LayerStack(NamedTuple):
    """A list of decoder layers, and its name in the decoder."""

    name: str
    layers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class ModelStructure:
    """Parts of a network that methods change.

    `stacks` are the names and layers of the decoder's stacks; published decoders have one. An image
    classifier has none and is described by `vision`. `parameters` is the number of weights, with
    tied ones counted once. `refusal` is the reason why the MoE blocks are not supported; reading
    `moe` then raises it. `dense_blocks` are the feed-forward layers of a decoder without experts,
    and `dense_refusal` is the reason why they are not supported.
    """

    architecture: str
    model_type: str
    stacks: tuple[LayerStack, ...]
    parameters: int
    blocks: tuple[MoEBlock, ...] = ()
    refusal: str | None = None
    vision: VisionConfig | None = None
    dense_blocks: tuple[MoEBlock, ...] = ()
    dense_refusal: str | None = None

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """Decoder layers in order; raises `UserError` if there are several stacks of them."""
        # Silently ignoring a stack would treat half of the network as the whole.
        if len(self.stacks) > 1:
            found = " and ".join(f"{stack.name} ({len(stack.layers)})" for stack in self.stacks)
            raise UserError(
                f"{self.architecture} has several stacks of decoder layers, {found}: methods and "
                "FLOP formulas support only one"
            )
        return self.stacks[0].layers if self.stacks else ()

    @property
    def moe(self) -> tuple[MoEBlock, ...]:
        """MoE blocks in layer order, without dense layers; raises `UserError` if unsupported."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        # Blocks are numbered by layer, which needs one stack.
        return self.blocks if self.layers else ()

    @property
    def micro_expert_blocks(self) -> tuple[MoEBlock, ...]:
        """Blocks whose micro-experts methods change.

        They are the MoE blocks, or in a decoder without experts the feed-forward of every layer, as
        a block of one expert that is always selected. Raises `UserError` if unsupported.
        """
        if self.moe:
            return self.moe
        if self.dense_refusal is not None:
            raise UserError(self.dense_refusal)
        return self.dense_blocks

    @property
    def moe_parameters(self) -> int:
        """Number of weights in all routed and shared experts."""
        return sum(block.parameters for block in self.moe)


def inspect_model(network: nn.Module) -> ModelStructure:
    """Inspect the modules of a network and return its structure, without computing anything."""
    if isinstance(network, Classifier):
        return _classifier_structure(network)
    config = getattr(network, "config", None)
    architecture = type(network).__name__
    stacks = _decoder_stacks(network)
    blocks: tuple[MoEBlock, ...] = ()
    # The refusal is stored instead of raised, because such a network can be evaluated and its other
    # parts can be changed.
    refusal = None
    try:
        blocks = _moe_blocks(network, [layer for stack in stacks for layer in stack.layers])
    except UnsupportedStructure as difference:
        refusal = f"{architecture} has experts in an unsupported form: {difference}"
    dense_blocks: tuple[MoEBlock, ...] = ()
    dense_refusal = None
    # Several stacks are refused when `layers` is read.
    if not blocks and refusal is None and len(stacks) == 1:
        try:
            dense_blocks = _dense_blocks(network, stacks[0].layers)
        except UnsupportedStructure as difference:
            dense_refusal = f"{architecture} has feed-forwards in an unsupported form: {difference}"
    return ModelStructure(
        architecture=architecture,
        model_type=str(getattr(config, "model_type", architecture)),
        stacks=stacks,
        parameters=sum(weight.numel() for weight in network.parameters()),
        blocks=blocks,
        refusal=refusal,
        dense_blocks=dense_blocks,
        dense_refusal=dense_refusal,
    )


def _classifier_structure(network: Classifier) -> ModelStructure:
    return ModelStructure(
        architecture=network.config.architecture,
        model_type="image_classifier",
        stacks=(),
        parameters=sum(weight.numel() for weight in network.parameters()),
        vision=network.config,
    )


def _decoder_stacks(network: nn.Module) -> tuple[LayerStack, ...]:
    """Return the decoder's outermost module lists that contain layers."""
    decoder = network
    if hasattr(network, "get_decoder"):
        decoder = cast(TransformersNetwork, network).get_decoder()
    stacks = [
        LayerStack(name, tuple(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and _holds_layers(module)
    ]
    # Lists deeper in the tree are experts or parts of a layer; names of outermost ones have the
    # fewest dots.
    outermost = min((stack.name.count(".") for stack in stacks), default=0)
    return tuple(stack for stack in stacks if stack.name.count(".") == outermost)


def _holds_layers(modules: nn.ModuleList) -> bool:
    """Return whether the items of a list are layers instead of single matrices or norms."""
    return any(any(True for _ in item.children()) for item in modules)


def _moe_blocks(network: nn.Module, layers: Sequence[nn.Module]) -> tuple[MoEBlock, ...]:
    # A block is recognised by its `experts` attribute, because every model family in transformers
    # defines its own block classes.
    names = {module: name for name, module in network.named_modules()}
    config = text_config(network) if hasattr(network, "config") else None
    top_k = getattr(config, "num_experts_per_tok", None)
    found = []
    for index, layer in enumerate(layers):
        owners = [m for m in layer.modules() if isinstance(getattr(m, "experts", None), nn.Module)]
        if not owners:
            _refuse_hidden_experts(layer, names)
        for block in owners:
            try:
                found.append(moe_block_of(index, names[block], block, layer, top_k))
            except UnsupportedStructure as difference:
                raise UnsupportedStructure(f"in {names[block]}, {difference}") from None
    return tuple(found)


def _dense_blocks(network: nn.Module, layers: tuple[nn.Module, ...]) -> tuple[MoEBlock, ...]:
    names = {module: name for name, module in network.named_modules()}
    return tuple(dense_block_of(index, names[layer], layer) for index, layer in enumerate(layers))


def _refuse_hidden_experts(layer: nn.Module, names: dict[nn.Module, str]) -> None:
    for module in layer.modules():
        # Otherwise such a layer would count as dense, and methods would silently skip its experts.
        kind = type(module).__name__
        counts = (getattr(module, name, None) for name in EXPERT_COUNT_NAMES)
        if "Experts" in kind or any(isinstance(count, int) and count > 1 for count in counts):
            raise UnsupportedStructure(f"{names[module]} is a {kind}")
