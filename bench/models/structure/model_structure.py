"""Decoder layers and MoE blocks of a network, found on any device including meta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from bench.errors import UserError
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.network import TransformersNetwork, text_config
from bench.models.structure.moe_block import (
    MoEBlock,
    UnsupportedStructure,
    dense_block_of,
    moe_block_of,
)


@dataclass(frozen=True)
class ModelStructure:
    """Parts of a network that methods change.

    `layers` are the decoder layers in order. An image classifier has none; `vision` describes it
    instead. `parameters` counts every weight once, tied ones too. `refusal` is the reason why the
    MoE blocks are not supported; reading `moe` then raises it. `dense_blocks` are the feed-forward
    layers of a decoder without experts, and `dense_refusal` the reason why they are not supported.
    """

    architecture: str
    model_type: str
    layers: tuple[nn.Module, ...]
    parameters: int
    blocks: tuple[MoEBlock, ...] = ()
    refusal: str | None = None
    vision: VisionConfig | None = None
    dense_blocks: tuple[MoEBlock, ...] = ()
    dense_refusal: str | None = None

    @property
    def moe(self) -> tuple[MoEBlock, ...]:
        """MoE blocks in layer order, without dense layers; raises `UserError` if unsupported."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.blocks

    @property
    def micro_expert_blocks(self) -> tuple[MoEBlock, ...]:
        """Blocks whose micro-experts methods change.

        They are the MoE blocks; in a decoder without experts, the feed-forward of every layer as a
        block of one expert that is always chosen. Raises `UserError` if unsupported.
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
    """Inspect the modules of a network and return its structure; nothing is computed."""
    if isinstance(network, Classifier):
        return _classifier_structure(network)
    config = getattr(network, "config", None)
    architecture = type(network).__name__
    layers = _decoder_layers(network)
    blocks: tuple[MoEBlock, ...] = ()
    # The refusal is stored, not raised: such a network can be evaluated and its other parts
    # changed; only readers of `moe` must fail.
    refusal = None
    try:
        blocks = _moe_blocks(network, layers)
    except UnsupportedStructure as difference:
        refusal = f"{architecture} has experts in an unsupported form: {difference}"
    dense_blocks: tuple[MoEBlock, ...] = ()
    dense_refusal = None
    if not blocks and refusal is None:
        try:
            dense_blocks = _dense_blocks(network, layers)
        except UnsupportedStructure as difference:
            dense_refusal = f"{architecture} has feed-forwards in an unsupported form: {difference}"
    return ModelStructure(
        architecture=architecture,
        model_type=str(getattr(config, "model_type", architecture)),
        layers=layers,
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
        layers=(),
        parameters=sum(weight.numel() for weight in network.parameters()),
        vision=network.config,
    )


def _decoder_layers(network: nn.Module) -> tuple[nn.Module, ...]:
    """Return the longest of the outermost module lists of the decoder, or an empty tuple."""
    decoder = network
    if hasattr(network, "get_decoder"):
        decoder = cast(TransformersNetwork, network).get_decoder()
    stacks = [
        (name.count("."), -len(module), tuple(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    # Lists deeper in the tree are experts or sublayers of one layer, so the fewest dots come first.
    # Of lists at the same depth the longest wins: a decoder with two stacks would silently be
    # reduced to the longer one.
    return min(stacks, key=lambda stack: stack[:2], default=(0, 0, ()))[2]


def _moe_blocks(network: nn.Module, layers: tuple[nn.Module, ...]) -> tuple[MoEBlock, ...]:
    # The `experts` attribute identifies a block, since every model family in transformers defines
    # block classes of its own.
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
                found.append(moe_block_of(index, names[block], block, top_k))
            except UnsupportedStructure as difference:
                raise UnsupportedStructure(f"in {names[block]}, {difference}") from None
    return tuple(found)


def _dense_blocks(network: nn.Module, layers: tuple[nn.Module, ...]) -> tuple[MoEBlock, ...]:
    names = {module: name for name, module in network.named_modules()}
    return tuple(dense_block_of(index, names[layer], layer) for index, layer in enumerate(layers))


def _refuse_hidden_experts(layer: nn.Module, names: dict[nn.Module, str]) -> None:
    for module in layer.modules():
        # Without this check, such a layer would pass as dense and methods would silently skip its
        # experts.
        if "Experts" in type(module).__name__:
            raise UnsupportedStructure(f"{names[module]} is a {type(module).__name__}")
