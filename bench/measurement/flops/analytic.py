"""Analytic multiply-adds of decoders, their heads and image classifiers, from shapes alone.

`CallTokens` describes the tokens of a call. In a classifier, a convolution uses each of its weights
once per position of its output.

Shapes: B samples, S tokens of a prompt, L new tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.measurement.flops.counter import meta_forward
from bench.models.classifiers.classifier import Classifier
from bench.models.macs import (
    MatmulCost,
    NetworkPart,
    TokenKind,
    attention_cost,
    feed_forward_costs,
    macs_per_pair,
    matrix_weights,
    projection_cost,
)
from bench.models.network import text_config
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import SHARED_NAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION_NAMES = ("self_attn", "attention", "attn")
FEED_FORWARD_NAMES = ("mlp", "block_sparse_moe", "feed_forward")


def decoder_macs(
    layers: Sequence[nn.Module], config: PretrainedConfig, tokens: CallTokens
) -> Iterator[MatmulCost]:
    """Yield the multiply-adds of all layers; `config` is that of the language part.

    Raises:
        UserError: there are no layers, or a layer has no known attention or feed-forward.
    """
    if not layers:
        raise UserError("no analytic FLOP formula: the network has no decoder layers")
    top_k = getattr(config, "num_experts_per_tok", None)
    for index, layer in enumerate(layers):
        attention, mlp = (
            _named_submodule(layer, ATTENTION_NAMES),
            _named_submodule(layer, FEED_FORWARD_NAMES),
        )
        per_pair, window = macs_per_pair(attention), _sliding_window(config, index)
        for rows, positions in tokens.by_token_kind():
            count = tokens.batch * len(positions)
            past = tokens.batch * tokens.past
            # A prefill counts all Q x K pairs even with a sliding window, because the kernel is
            # called with them. In decoding, the cache of a sliding-window layer has been cropped to
            # the window, so the kernel gets no more keys.
            keys = tokens.keys if window is None or not tokens.past else min(tokens.keys, window)
            yield projection_cost(attention, count, past, rows)
            yield attention_cost(
                rows, count * keys, tokens.visible_pairs(positions, window), per_pair
            )
            yield from feed_forward_costs(mlp, count, rows, top_k)
            # Shared experts outside the block (Granite).
            for name, part in layer.named_children():
                if name in SHARED_NAMES:
                    yield MatmulCost("shared", count * matrix_weights(part), rows)


def head_macs(network: nn.Module, rows: int) -> MatmulCost:
    """Return the multiply-adds of the language-modelling head for `rows` hidden states.

    Raises:
        UserError: the network has no linear head.
    """
    embeddings = getattr(network, "get_output_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Linear):
        raise UserError(f"no analytic FLOP formula for the head of {type(network).__name__}")
    # From the shape instead of stored weights, because a head tied to the embeddings also counts.
    return MatmulCost("head", float(rows * embeddings.in_features * embeddings.out_features))


def _named_submodule(layer: nn.Module, names: Sequence[str]) -> nn.Module:
    found = (getattr(layer, name, None) for name in names)
    part = next((each for each in found if isinstance(each, nn.Module)), None)
    if part is None:
        raise UserError(
            f"no analytic FLOP formula for {type(layer).__name__}: expected one of the submodules "
            f"{', '.join(names)}"
        )
    return part


def _sliding_window(config: PretrainedConfig, index: int) -> int | None:
    """Return the sliding window of a layer, or None if it attends to all earlier tokens."""
    window: int | None = getattr(config, "sliding_window", None)
    # Models with both kinds of attention list the kind per layer; the others, such as Mistral,
    # apply `sliding_window` to every layer.
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return window


def text_forward_macs(
    network: nn.Module, structure: ModelStructure, batch: int, length: int
) -> list[MatmulCost]:
    """Return the multiply-adds of `batch` sequences of `length` tokens with logits for every token.

    Raises:
        UserError: a part of the network has no analytic FLOP formula.
    """
    tokens = CallTokens.text(batch, length)
    layers = decoder_macs(structure.layers, text_config(network), tokens)
    return [*layers, head_macs(network, batch * length)]


def text_token_macs(
    network: nn.Module, structure: ModelStructure, batch: int, length: int
) -> list[MatmulCost]:
    """Return the multiply-adds of the next token of `batch` sequences with `length` cached tokens.

    Raises:
        UserError: a part of the network has no analytic FLOP formula.
    """
    tokens = CallTokens.text(batch, 1, past=length)
    return [
        *decoder_macs(structure.layers, text_config(network), tokens),
        head_macs(network, batch),
    ]


@dataclass(frozen=True)
class CallTokens:
    """New tokens of a call: `positions` in the sequence, int64 [L]; `visual`, bool [L].

    All `batch` sequences have the same tokens. `past` tokens are already in the KV cache.
    """

    positions: Tensor
    visual: Tensor
    batch: int = 1
    past: int = 0

    @staticmethod
    def text(batch: int, length: int, past: int = 0) -> CallTokens:
        """Return the tokens of a call without images."""
        return CallTokens(
            torch.arange(past, past + length), torch.zeros(length, dtype=torch.bool), batch, past
        )

    @staticmethod
    def prompt(visual_BS: Tensor) -> CallTokens:
        """Return the tokens of a prompt; all samples of `visual_BS` must have the same mask."""
        # The first sample represents all, because measured prompts are copies of one prompt.
        visual_S = visual_BS[0].cpu()
        return CallTokens(torch.arange(len(visual_S)), visual_S, len(visual_BS))

    @property
    def keys(self) -> int:
        """Number of keys of one sequence, including cached ones."""
        return self.past + len(self.positions)

    def by_token_kind(self) -> list[tuple[TokenKind, Tensor]]:
        """Return the positions of text and of visual tokens, without kinds that have no tokens."""
        both: list[tuple[TokenKind, Tensor]] = [
            ("text", self.positions[~self.visual]),
            ("visual", self.positions[self.visual]),
        ]
        return [(rows, positions) for rows, positions in both if len(positions)]

    def visible_pairs(self, positions: Tensor, window: int | None) -> int:
        """Return the number of causal (query, key) pairs of the tokens at `positions`.

        A token attends to itself and to earlier tokens, at most `window` keys in total.
        """
        # Positions count from 0 and include the cache, so the token at p has p + 1 keys.
        keys = positions + 1
        return int((keys if window is None else keys.clamp(max=window)).sum()) * self.batch


def classifier_macs(network: Classifier, batch: int) -> list[MatmulCost]:
    """Return the multiply-adds of one forward over `batch` images of the network's input size.

    The forward runs on the meta device, so that the layers themselves derive output shapes from
    stride and padding, without computing anything.

    Raises:
        UserError: the network is from torchvision or the user.
    """
    config = network.config
    if not len(network.head):
        # They may have multiply-adds outside convolutions and dense layers.
        raise UserError(f"{config.architecture} is not built here: its products are not known")
    products: list[MatmulCost] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        kind: NetworkPart = "convolution" if isinstance(layer, nn.Conv2d) else "dense"
        # A dense layer has no spatial dimensions, and the product of none is 1.
        positions = output.shape[0] * output.shape[2:].numel()
        products.append(MatmulCost(kind, float(positions * matrix_weights(layer))))

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with meta_forward(network) as call:
            shape = (batch, config.channels, config.size, config.size)
            call(torch.zeros(shape, dtype=torch.bfloat16, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return products
